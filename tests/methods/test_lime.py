"""LIME, against the same coalitions fitted by scikit-learn."""

from math import sqrt

import pytest
import torch
from method_cases import measured, mlp
from sklearn.linear_model import Ridge
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import Lime
from tdhook_train.errors import SettingsError


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def by_scikit_learn(model, x, kept, similarity, alpha):
    """One row after another: ``[row, target, group]`` and ``[row, target]``."""
    found, fits = [], []
    for row, z in zip(x, kept, strict=True):
        y = model(z * row).detach().double().numpy()
        weight = [similarity(one) for one in z]
        shares, r2 = [], []
        for target in y.T:
            fit = Ridge(alpha=alpha).fit(z.double().numpy(), target, sample_weight=weight)
            shares.append(torch.tensor(fit.coef_))
            r2.append(fit.score(z.double().numpy(), target, sample_weight=weight))
        found.append(torch.stack(shares))
        fits.append(torch.tensor(r2))
    return torch.stack(found).float(), torch.stack(fits).float()


def cosine(width):
    ones = torch.ones(5, dtype=torch.float64)
    return lambda z: torch.exp(
        -((1 - torch.nan_to_num(z.double() @ ones / (z.double().norm() * ones.norm()))) ** 2) / width**2
    ).item()


def euclidean(width):
    return lambda z: torch.exp(-((z.double() - 1).norm() ** 2) / width**2).item()


@pytest.mark.parametrize(
    ("settings", "similarity"),
    [
        ({}, cosine(0.25)),
        ({"alpha": 0.0}, cosine(0.25)),
        ({"kernel_width": 0.6, "alpha": 3.0}, cosine(0.6)),
        ({"distance": "euclidean"}, euclidean(0.75 * sqrt(5))),
        ({"distance": "euclidean", "kernel_width": 1.5}, euclidean(1.5)),
    ],
    ids=["default", "no penalty", "narrow", "euclidean", "euclidean, wide"],
)
def test_the_same_coalitions_by_scikit_learn(settings, similarity, monkeypatch):
    model, x = mlp(5, 16, 2), torch.randn(3, 5)
    kept = torch.rand(3, 40, 5) < 0.5
    kept[0, 3] = False  # no group at all
    monkeypatch.setattr("tdhook_train.explain.problem.Problem.drawn", lambda *_: kept)
    found = measured(Lime(samples=40, **settings), model, td_of(input=x))
    expected, r2 = by_scikit_learn(model, x, kept, similarity, settings.get("alpha", 1.0))
    assert kept[:, 0].all()
    assert_close(found["attr", "input"], expected, atol=1e-5, rtol=1e-4)
    assert_close(found["r2"], r2, atol=1e-5, rtol=1e-4)


def test_a_linear_network_is_its_own_surrogate():
    model, x, base = nn.Linear(6, 2), torch.randn(4, 6), torch.randn(4, 6)
    td = TensorDict({"input": x, "baseline": {"input": base}}, [4])
    found = measured(Lime(alpha=0.0, groups={"a": [0, 1], "b": [2]}), model, td)
    each = (model.weight * (x - base)[:, None]).detach()
    expected = torch.stack([each[..., :2].sum(-1), each[..., 2], each[..., 3:].sum(-1)], -1)
    assert_close(found["shares"], expected, atol=1e-5, rtol=1e-4)
    assert_close(found["r2"], torch.ones(4, 2))
    penalised = measured(Lime(groups={"a": [0, 1], "b": [2]}), model, td)["shares"]
    assert (penalised.norm(dim=-1) < expected.norm(dim=-1)).all()


def test_fewer_coalitions_than_groups_have_a_fit_as_well():
    found = measured(Lime(samples=4, alpha=0.0), mlp(9, 4, 1), td_of(input=torch.randn(3, 9)))
    assert_close(found["r2"], torch.ones(3, 1))
    assert found["attr", "input"].isfinite().all()


def test_rows_do_not_mix_and_passes_do_not_matter():
    model, x = mlp(5, 8, 2), torch.randn(7, 5)
    whole = measured(Lime(samples=30), model, td_of(input=x))["attr", "input"]
    assert_close(measured(Lime(samples=30, max_bytes=2000), model, td_of(input=x))["attr", "input"], whole)
    other = torch.cat([x[:3], torch.randn(4, 5)])
    assert_close(measured(Lime(samples=30), model, td_of(input=other))["attr", "input"][:3], whole[:3])


def test_what_does_not_look_has_exactly_0_and_no_fit():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    found = measured(Lime(samples=30), model, td_of(input=torch.randn(4, 3)))
    assert found["attr", "input"].eq(0).all()
    assert found["r2"].isnan().all()


def test_layers_have_a_fit_each():
    found = measured(Lime(layers=("0", "1"), samples=20), mlp(3, 5, 2), td_of(input=torch.randn(4, 3)))
    assert found["attr", "0"].shape == (4, 2, 5)
    assert found["r2", "1"].shape == (4, 2)


def test_settings_that_do_not_fit():
    with pytest.raises(SettingsError, match="Lime needs kernel_width above 0, got -1"):
        Lime(kernel_width=-1)
    with pytest.raises(SettingsError, match="distance='cosin' is none of 'cosine', 'euclidean'; did you mean 'cosine'"):
        Lime(distance="cosin")


def test_the_values_of_captum():
    captum = pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")
    from captum._utils.models.linear_model import SkLearnRidge

    model, x = mlp(5, 16, 2), torch.randn(1, 5)
    similarity = cosine(0.25)
    torch.manual_seed(0)
    theirs = captum.Lime(
        model,
        interpretable_model=SkLearnRidge(alpha=1.0),
        similarity_func=lambda _input, _moved, z, **_: torch.tensor(similarity(z[0])),
    ).attribute(x, target=1, n_samples=4000)
    found = measured(Lime(targets=("output", 1), samples=4000), model, td_of(input=x))["attr", "input"]
    assert (found - theirs).abs().max() < 0.05 * found.abs().max()  # coalitions drawn apart
