"""Ranks of representations: against singular values of the matrix itself, one rule after the other."""

import numpy as np
import pytest
import scipy.linalg
import torch
from method_cases import batch, measured, mlp
from tensordict import TensorDict
from torch import nn

from tdhook_train.errors import SettingsError
from tdhook_train.health import EffectiveRank, FeatureRank, SRank, StableRank
from tdhook_train.ops.spectrum import srank

METHODS = {"srank": SRank, "feature_rank": FeatureRank, "stable_rank": StableRank, "effective_rank": EffectiveRank}
each = pytest.mark.parametrize("name", METHODS)


class Gives(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value, self.layer = value, nn.Identity()

    def forward(self, x):
        return self.layer(self.value)


def on(method, value):
    return measured(method, Gives(value), TensorDict({"input": torch.zeros(len(value), 1)}, [len(value)]))


def by_hand(name, value, delta=0.01, epsilon=0.01):
    """Each rule in plain Python, from scipy's singular values of the matrix itself."""
    sigma = scipy.linalg.svdvals(np.asarray(value, dtype=np.float64)).tolist()
    if name == "srank":
        return next(k for k in range(1, len(sigma) + 1) if sum(sigma[:k]) >= (1 - delta) * sum(sigma))
    if name == "feature_rank":
        return sum(s / len(value) ** 0.5 > epsilon for s in sigma)
    if name == "stable_rank":
        return float(np.linalg.norm(value, "fro") ** 2) / sigma[0] ** 2
    return float(np.exp(-sum(s / sum(sigma) * np.log(s / sum(sigma)) for s in sigma if s > 0)))


@each
@pytest.mark.parametrize("shape", [(300, 7), (64, 64), (20, 50)])
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0, 3.0])
def test_each_rule_on_the_singular_values_raw_and_centred(name, shape, decay):
    value = torch.randn(shape, dtype=torch.float64) * torch.exp(-decay * torch.arange(shape[1])) + 0.3
    out = on(METHODS[name](), value)
    assert out[name].item() == pytest.approx(by_hand(name, value), rel=1e-6)
    assert out[f"{name}_centred"].item() == pytest.approx(by_hand(name, value - value.mean(0)), rel=1e-6)


@each
def test_orthonormal_columns_rank_one_and_zero(name):
    columns, _ = torch.linalg.qr(torch.randn(100, 6, dtype=torch.float64))
    assert on(METHODS[name](), columns * 10)[name].item() == pytest.approx(6, rel=1e-9)
    outer = torch.randn(100, 1, dtype=torch.float64) @ torch.randn(1, 6, dtype=torch.float64)
    assert on(METHODS[name](), outer)[name].item() == pytest.approx(1, abs=1e-5)
    zero = on(METHODS[name](), torch.zeros(100, 6))
    assert [float(zero[key]) for key in (name, f"{name}_centred", f"{name}_pooled", f"{name}_centred_pooled")] == [
        0
    ] * 4


@each
@pytest.mark.parametrize("constant", [5.0, 0.1, -1e-3, 1e6])
def test_a_constant_layer_has_rank_one_and_none_about_its_mean(name, constant):
    out = on(METHODS[name](), torch.full((100, 6), constant))
    expected = 0 if name == "feature_rank" and abs(constant) < 0.004 else 1
    assert out[name].item() == pytest.approx(expected, abs=1e-5)
    assert out[f"{name}_centred"].item() == 0
    # as what a layer computes of many rows: the last bit differs
    noisy = torch.full((101, 6), constant) * (1 + torch.finfo(torch.float32).eps * torch.randint(-1, 2, (101, 6)))
    assert len(noisy.unique()) > 1
    assert on(METHODS[name](), noisy)[f"{name}_centred"].item() == 0


def test_equal_singular_values_that_are_no_more_than_delta_of_all_may_be_missing():
    # of 100 equal ones, each .01 of their sum, 99 reach .99 exactly, and rounding does not decide it
    columns, _ = torch.linalg.qr(torch.randn(400, 100, dtype=torch.float64))
    for scale in (1.0, 3.0, 1e-7):
        assert on(SRank(), columns * scale)["srank"].item() == 99
    for size, delta, rank in ((0.1, 0.5, 7), (1 / 3, 0.25, 6), (1e-7, 0.7, 3), (3.0, 0.7, 3)):
        width = round(rank / (1 - delta))
        assert srank(torch.full((width,), size, dtype=torch.float64), delta).item() == rank


def test_the_feature_rank_is_not_free_of_scale_and_the_others_are():
    value = torch.randn(200, 8)
    for name, make in METHODS.items():
        large, small = (float(on(make(), value * scale)[name]) for scale in (1.0, 1e-4))
        assert (large == pytest.approx(small, rel=1e-4)) == (name != "feature_rank")
    assert on(FeatureRank(epsilon=1e-6), value * 1e-4)["feature_rank"].item() == 8
    twice = torch.cat([value, value])  # nor does it grow with the rows
    scaled = [by_hand("feature_rank", v, epsilon=0.95) for v in (value, twice)]
    found = [int(on(FeatureRank(epsilon=0.95), v)["feature_rank"]) for v in (value, twice)]
    assert found == scaled == [found[0]] * 2


def test_the_gram_matrix_resolves_what_the_thresholds_ask_for():
    left, _ = torch.linalg.qr(torch.randn(500, 12, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    for smallest in (1e-5, 1e-7):  # of the largest; each direction that is lost would change the count
        sigma = torch.logspace(0, np.log10(smallest), 12, dtype=torch.float64) * 500**0.5
        value = left * sigma @ right.T
        for delta in (0.01, 1e-5):
            assert on(SRank(delta=delta), value)["srank"].item() == by_hand("srank", value, delta=delta)
        for epsilon in (0.01, 2e-5, smallest * 0.7):
            found = on(FeatureRank(epsilon=epsilon), value)["feature_rank"].item()
            assert found == by_hand("feature_rank", value, epsilon=epsilon)


@each
def test_pooled_is_the_share_of_all_directions(name):
    model = mlp(3, 9, 4, 9, 2)
    out = measured(METHODS[name](), model, batch(80))
    for kind in ("", "_centred"):
        expected = float(out[f"{name}{kind}"].sum()) / (9 + 9 + 4 + 4 + 9 + 9 + 2)
        assert float(out[f"{name}{kind}_pooled"]) == pytest.approx(expected)


def test_too_few_rows_are_told_layer_by_layer():
    model, td = mlp(3, 300, 2), batch(2100)
    assert measured(SRank(), model, td)["srank_few_rows"].tolist() == [1, 1, 0]  # 8 × 300 rows
    assert measured(SRank(), model, td[:2047])["srank_few_rows"].tolist() == [1, 1, 1]
    assert measured(SRank(), model, td[:2048])["srank_few_rows"].tolist() == [1, 1, 0]


def test_channels_are_units_and_several_ranks_stand_in_one_row(tmp_path):
    from tdhook_train import At, Observer, ProbeSet

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    td = TensorDict({"input": torch.randn(10, 1, 6, 6)}, [10])
    with Observer({"h": [make() for make in METHODS.values()]}, when=At(0), into=tmp_path, on=ProbeSet(td)) as observer:
        observer.step(model, step=0)
        row = observer.buffer["h"].at(0)
    channels = model[0](td["input"]).detach().movedim(1, -1).reshape(-1, 4)
    for name in METHODS:
        assert row[name][0].item() == pytest.approx(by_hand(name, channels), rel=1e-4)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, float("nan")])
def test_a_delta_that_is_no_share_is_refused(delta):
    with pytest.raises(SettingsError, match="SRank needs delta between 1e-6 and 1, got"):
        SRank(delta=delta)
