"""Units and directions that were planted are found, and nothing else."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn

from tdhook_train.health import DeadUnits, DormantUnits, EffectiveRank, FeatureRank, SRank, StableRank
from tdhook_train.health.spectral import Spectral


class Gives(nn.Module):
    """A layer whose activations the test chooses."""

    def __init__(self, value, module=None):
        super().__init__()
        self.value, self.layer = value, module or nn.Identity()

    def forward(self, x):
        return self.layer(self.value)


def on(method, value, module=None):
    """One method on one layer that gives out ``value``."""
    return measured(method, Gives(value, module), TensorDict({"input": torch.zeros(len(value), 1)}, [len(value)]))


PLANTED = torch.randn(500, 5, generator=torch.Generator().manual_seed(0)).abs() * torch.tensor([1.0, 0, 0.02, 1, 0.005])


def test_dormancy_is_the_mean_activity_over_the_layers_average():
    out = on(DormantUnits(taus=(0.0, 0.025, 0.1, 1e9)), PLANTED)
    activity = [sum(abs(float(v)) for v in column) / 500 for column in PLANTED.T]
    scores = [a / (sum(activity) / 5) for a in activity]
    torch.testing.assert_close(out["dormancy"][0], torch.tensor(scores))
    assert [round(float(share) * 5) for share in out["dormant"][0]] == [1, 2, 3, 5]
    negative = on(DormantUnits(), -PLANTED)
    torch.testing.assert_close(negative["dormancy"], out["dormancy"])


def test_a_layer_that_is_all_zero_is_all_dormant():
    out = on(DormantUnits(), torch.zeros(20, 3))
    assert out["dormant"].tolist() == [[1.0, 1.0, 1.0]]
    assert out["dormancy"].tolist() == [[0.0, 0.0, 0.0]]


def test_a_saturated_tanh_is_dead_but_not_dormant():
    value = torch.randn(200, 4)
    value[:, 1], value[:, 2] = 12.0, -15.0 - value[:, 2].abs()
    dead = on(DeadUnits(layers="layer"), value, nn.Tanh())
    dormant = on(DormantUnits(layers="layer"), value, nn.Tanh())
    assert dead["dead_unit"].tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert dead["dead"].tolist() == [0.5]
    assert dormant["dormant"].tolist() == [[0.0, 0.0, 0.0]]
    # a linear layer that gives out a constant is not dead: it is not zero
    assert on(DeadUnits(layers="layer"), value)["dead"].tolist() == [0.0]


def test_a_relu_is_dead_where_it_is_zero_on_every_row():
    model = mlp(3, 6, 2, activation=nn.ReLU)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = -1.0
        model[0].bias[[0, 2, 3, 5]] = 10.0
    td = TensorDict({"input": torch.randn(50, 3)}, [50])
    out = measured(DeadUnits(), model, td)
    assert out["dead_unit"][1].tolist() == [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert out["dead"][1].item() == pytest.approx(2 / 6)
    assert out["width"].tolist() == [6, 6, 2]
    assert out["dead_unit"][2, 2:].isnan().all()
    assert measured(DormantUnits(), model, td)["dormant"][1, 0].item() == pytest.approx(2 / 6)


def test_channels_of_an_image_are_its_units():
    value = torch.rand(6, 4, 3, 3) + 1
    value[:, 2] = 0
    assert on(DeadUnits(), value)["dead_unit"].tolist() == [[0.0, 0.0, 1.0, 0.0]]
    assert on(DormantUnits(), value)["dormant"][0, 0].item() == pytest.approx(0.25)


# ---------------------------------------------------------------------- rank


def by_svd(value):
    """Roy and Vetterli, from the singular values."""
    sigma = torch.linalg.svdvals(value.double())
    p = (sigma / sigma.sum()).clamp_min(1e-300)
    return float((-(p * p.log()).sum()).exp())


@pytest.mark.parametrize("shape", [(300, 7), (64, 64), (20, 50)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_the_effective_rank_is_that_of_the_singular_values(shape, decay):
    value = torch.randn(shape, dtype=torch.float64) * torch.exp(-decay * torch.arange(shape[1])) + 0.3
    out = on(EffectiveRank(), value)
    assert out["effective_rank"].item() == pytest.approx(by_svd(value), rel=1e-5)
    assert out["effective_rank_centred"].item() == pytest.approx(by_svd(value - value.mean(0)), rel=1e-5)


def test_orthonormal_columns_rank_one_and_zero():
    columns, _ = torch.linalg.qr(torch.randn(100, 6, dtype=torch.float64))
    assert on(EffectiveRank(), columns * 3)["effective_rank"].item() == pytest.approx(6)
    outer = torch.randn(100, 1, dtype=torch.float64) @ torch.randn(1, 6, dtype=torch.float64)
    assert on(EffectiveRank(), outer)["effective_rank"].item() == pytest.approx(1, abs=1e-5)
    zero = on(EffectiveRank(), torch.zeros(100, 6))
    assert (zero["effective_rank"].item(), zero["effective_rank_centred"].item()) == (0.0, 0.0)
    constant = on(EffectiveRank(), torch.full((100, 6), 5.0))
    assert constant["effective_rank"].item() == pytest.approx(1, abs=1e-5)
    assert constant["effective_rank_centred"].item() == pytest.approx(0.0, abs=1e-9)


def test_a_large_common_offset_hides_the_rank_but_not_the_centred_one():
    spread, _ = torch.linalg.qr(torch.randn(400, 8, dtype=torch.float64))
    spread = spread - spread.mean(0)
    out = on(EffectiveRank(), spread + 1000.0)
    assert out["effective_rank"].item() < 1.1
    assert out["effective_rank_centred"].item() == pytest.approx(by_svd(spread), rel=1e-4)


def test_scale_does_not_matter_and_layers_of_many_widths_keep_their_order():
    model = mlp(3, 9, 4, 9, 2)
    td = TensorDict({"input": torch.randn(80, 3)}, [80])
    out = measured(EffectiveRank(), model, td)["effective_rank"]
    value, expected = td["input"], []
    for layer in model:
        value = layer(value).detach()
        expected.append(by_svd(value))
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    one, big = on(EffectiveRank(), td["input"]), on(EffectiveRank(), td["input"] * 1e-6)
    torch.testing.assert_close(one["effective_rank"], big["effective_rank"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "method",
    [EffectiveRank(), SRank(), FeatureRank(), StableRank(), DormantUnits(), DeadUnits()],
    ids=lambda m: type(m).__name__,
)
def test_activations_that_are_not_finite_do_not_stop_the_others(method, bad):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Linear(3, 4), Bad()

        def forward(self, x):
            h = self.good(x)
            self.bad(h)
            return h

    class Bad(nn.Module):
        def forward(self, x):
            return torch.where(torch.arange(len(x))[:, None] == 2, bad, x)

    model, td = Two(), TensorDict({"input": torch.randn(30, 3)}, [30])
    out, alone = measured(method, model, td), measured(method, model.good, td)
    pooled = {"dormant": "dormant_pooled", "dead": "dead_pooled"}  # of ranks: the name with an ending
    for key, dims in type(method).writes.items():
        if "layer" in dims:
            assert torch.equal(out[key][0], alone[key][0])
        else:  # of the network: the layer that is not finite is left out
            torch.testing.assert_close(out[key], alone[key])
            assert out[key].isfinite().all()
        if key in pooled or (key != "srank_few_rows" and isinstance(method, Spectral) and "layer" in dims):
            assert out[key][1].isnan().all()
    only = measured(type(method)(layers="bad"), model, td)
    assert all(only[key].isnan().all() for key in type(method).writes if "pooled" in key)


@pytest.mark.parametrize("method", [DormantUnits((nn.Tanh, nn.Linear), (0.0, 0.5)), DeadUnits((nn.Tanh, nn.Linear))])
def test_pooled_is_the_share_of_all_units_of_the_network(method):
    model = mlp(3, 9, 4, 2)
    with torch.no_grad():
        for layer, units in ((0, [1, 2, 5]), (2, [3])):
            model[layer].weight[units], model[layer].bias[units] = 0.0, 0.0
    out = measured(method, model, TensorDict({"input": torch.randn(60, 3)}, [60]))
    name, units = ("dormant", "dormancy") if isinstance(method, DormantUnits) else ("dead", "dead_unit")
    every = out[units][~out[units].isnan()]
    assert len(every) == 2 * (9 + 4) + 2
    expected = [(every <= tau).sum() / len(every) for tau in (0.0, 0.5)] if name == "dormant" else every.mean()
    torch.testing.assert_close(out[f"{name}_pooled"], torch.as_tensor(expected))
    assert float(out[f"{name}_pooled"].flatten()[0]) == pytest.approx(2 * 4 / 28)
