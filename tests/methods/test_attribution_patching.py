"""AttributionPatching against slopes taken pair by pair, exact patching, and correlations by NumPy."""

import numpy as np
import pytest
import torch
from method_cases import measured, mlp
from patching_models import HandTransformer
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.latent import ActivationPatching, AttributionPatching


def pairs(*shape, rows=6):
    both = torch.randn(2, rows, *shape, dtype=torch.float64)
    return TensorDict({"input": both[0], "source": {"input": both[1]}}, [rows])


def value_at(model, x, path, side):
    """What a module gives out or takes in, in the graph, and the output."""
    seen = []

    def given(_module, _args, out):
        seen.append(out)

    def taken(_module, args):
        seen.append(args[0].clone())  # of this module alone: others may read the same tensor
        return (seen[0],)

    module = model.get_submodule(path)
    handle = module.register_forward_hook(given) if side == "output" else module.register_forward_pre_hook(taken)
    out = model(x)
    handle.remove()
    return seen[0], out


def slopes_by_hand(model, td, path, target, side="output", change=None):
    """``∇M · (h' - h)`` entry by entry, one pair at a time: [pair, *shape]."""
    rows = []
    for i, (base, source) in enumerate(zip(td["input"], td["source", "input"], strict=True)):
        value, out = value_at(model, base[None].requires_grad_(), path, side)
        (slope,) = torch.autograd.grad(out[0, target], value)
        new = value_at(model, source[None], path, side)[0] if change is None else change[i][None]
        rows.append((slope * (new - value))[0].detach())
    return torch.stack(rows)


LAYERS = ("h.0.attn.q_proj", "h.0.up", "h.1.attn.o_proj", "h.1.down")


@pytest.mark.parametrize("side", ["output", "input"])
def test_every_part_is_slope_times_change(side):
    model, td = HandTransformer().double(), pairs(5, 3, rows=3)
    parts = {"parts": ("layer", "unit", "position", "head"), "heads": 2}
    out = measured(AttributionPatching(LAYERS, side=side, sample=0, verify=0, **parts), model, td)
    assert "agreement" not in out
    assert "top_layer" not in out
    for i, path in enumerate(LAYERS):
        for target in range(2):
            each = slopes_by_hand(model, td, path, target, side)
            width = each.shape[-1]
            assert_close(out["effect"][i, target], each.sum((1, 2)).abs().mean())
            assert_close(out["unit_effect"][i, :width, target], each.sum(1).abs().mean(0))
            assert out["unit_effect"][i, width:].isnan().all()
            assert_close(out["position_effect"][i, :, target], each.sum(2).abs().mean(0))
            heads = each.unflatten(2, (2, -1)).sum((1, 3))
            assert_close(out["head_effect"][i, :, target], heads.abs().mean(0))
            gap = (model(td["source", "input"]) - model(td["input"])).detach()[:, target]
            assert_close(
                out["unit_normalised"][i, :width, target], (each.sum(1).T * gap.sign()).sum(1) / gap.abs().sum()
            )
            assert_close(out["gap"][i, target], gap.abs().mean())


@pytest.mark.parametrize("by", ["zero", "mean", "resample"])
def test_what_replaces_may_be_something_else(by):
    model, td = mlp(3, 5, 4, 2).double(), pairs(3)
    out = measured(AttributionPatching(("0", "1", "2"), by=by), model, td)
    for i, path in enumerate(("0", "1", "2")):
        values = torch.cat(
            [value_at(model, td[key], path, "output")[0].detach() for key in ("input", ("source", "input"))]
        )
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
        drawn = torch.empty(6, dtype=torch.int64)
        drawn[order] = order.roll(1)
        new = {"zero": torch.zeros_like(values[:6]), "mean": values.mean(0).expand(6, -1), "resample": values[drawn]}[
            by
        ]
        for target in range(2):
            each = slopes_by_hand(model, td, path, target, change=new)
            assert_close(out["unit_effect"][i, : each.shape[1], target], each.abs().mean(0))
            assert_close(out["effect"][i, target], each.sum(1).abs().mean())
    assert out["agreement_overall"].min() > 0.5
    assert "normalised" not in out


def test_where_all_that_follows_is_linear_it_is_exact():
    model, td = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2)).double(), pairs(3)
    layers = ("1", "2", "3")
    out = measured(AttributionPatching(layers, way="both"), model, td)
    exact = measured(ActivationPatching(layers, way="both"), model, td)
    for key in exact.keys():  # noqa: SIM118 - a TensorDict iterates over its rows
        if key not in ("input", "source", "output"):
            assert_close(out[key], exact[key], equal_nan=True)
    for way in ("", "_denoise"):
        assert_close(out[f"agreement{way}"], torch.ones(3, 2, dtype=torch.float64))
        assert_close(out[f"top_estimate{way}"], out[f"top_exact{way}"])


def test_before_an_activation_that_saturates_it_agrees_less_than_behind_it():
    model, td = mlp(8, 32, 32, 2).double(), pairs(8, rows=64)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=0.6)
    out = measured(AttributionPatching(("0", "1", "2", "3")), model, td)
    before, behind, late, last = out["agreement"].mean(1)
    assert before < behind
    assert late < last
    assert_close(last, torch.ones((), dtype=torch.float64))
    assert late < 0.95


def test_agreement_is_the_correlation_over_pairs_and_parts():
    model, td = mlp(3, 12, 9, 2).double(), pairs(3)
    layers, sizes, sample = ("0", "1", "2"), (12, 12, 9), 4
    out = measured(AttributionPatching(layers, sample=sample), model, td)
    pooled = [[], []]
    for i, (path, size) in enumerate(zip(layers, sizes, strict=True)):
        units = [k * size // sample for k in range(sample)]
        clean = model(td["input"]).detach()
        exact, estimates = [], []
        for unit in units:
            new = value_at(model, td["source", "input"], path, "output")[0].detach()
            exact.append(swapped(model, td["input"], path, new, unit) - clean)
            by_target = [slopes_by_hand(model, td, path, target)[:, unit] for target in range(2)]
            estimates.append(torch.stack(by_target, 1))
        exact, estimates = torch.cat(exact), torch.cat(estimates)
        for target in range(2):
            expected = np.corrcoef(estimates[:, target], exact[:, target])[0, 1]
            np.testing.assert_allclose(out["agreement"][i, target], expected, rtol=1e-9)
        pooled = [[*pooled[0], estimates], [*pooled[1], exact]]
    estimates, exact = (torch.cat(part) for part in pooled)
    for target in range(2):
        expected = np.corrcoef(estimates[:, target], exact[:, target])[0, 1]
        np.testing.assert_allclose(out["agreement_overall"][target], expected, rtol=1e-9)


def swapped(model, x, path, new, unit):
    def hook(_module, _args, out):
        return torch.cat([out[:, :unit], new[:, unit : unit + 1], out[:, unit + 1 :]], 1)

    handle = model.get_submodule(path).register_forward_hook(hook)
    out = model(x).detach()
    handle.remove()
    return out


def test_the_largest_estimates_are_held_against_exact_effects():
    model, td = mlp(3, 6, 4, 2).double(), pairs(3)
    layers = ("0", "1", "2", "3")
    out = measured(AttributionPatching(layers, verify=5), model, td)
    exact = measured(ActivationPatching(layers), model, td)["unit_effect"]
    for target in range(2):
        ranked = []
        for i in range(4):
            known = out["unit_effect"][i, :, target]
            ranked += [(float(e), i, k) for k, e in enumerate(known) if not e.isnan()]
        ranked.sort(reverse=True)
        for rank, (estimate, layer, part) in enumerate(ranked[:5]):
            assert out["top_layer"][rank, target] == layer
            assert out["top_part"][rank, target] == part
            assert_close(float(out["top_estimate"][rank, target]), estimate)
            assert_close(out["top_exact"][rank, target], exact[layer, part, target])
    every = measured(AttributionPatching(layers, verify=999), model, td)
    assert every["top_layer"].shape == (6 + 6 + 4 + 4, 2)  # as many as there are
    assert every["top_exact"].isfinite().all()


def test_agreement_and_the_largest_are_of_the_last_kind_of_part():
    model, td = HandTransformer().double(), pairs(5, 3, rows=3)
    out = measured(AttributionPatching("h.0.down", parts=("unit", "position"), verify=3), model, td)
    exact = measured(ActivationPatching("h.0.down", parts="position"), model, td)["position_effect"][0]
    for target in range(2):
        best = out["position_effect"][0, :, target].topk(3).indices
        assert out["top_part"][:, target].tolist() == best.tolist()
        assert_close(out["top_exact"][:, target], exact[best, target])


def test_what_does_not_move_agrees_with_nothing():
    model, td = mlp(3, 5, 2).double(), pairs(3)
    td["source", "input"] = td["input"].clone()
    out = measured(AttributionPatching(), model, td)
    for key in ("agreement", "agreement_overall", "normalised"):
        assert out[key].isnan().all()
    for key in ("effect", "gap", "top_estimate", "top_exact"):
        assert out[key].eq(0).all()
    td["source", "input"][0] = torch.nan
    out = measured(AttributionPatching(), model, td)
    assert out["effect"].isnan().all()
    assert out["agreement"].isnan().all()
    assert out["top_estimate"].isnan().all()


def test_what_is_no_number_ranks_last():
    model, td = nn.Sequential(nn.Identity(), nn.Linear(3, 1)).double(), pairs(3)
    model[1].weight.data.copy_(torch.tensor([[1.0, 0, 2]]))
    td["source", "input"][0, 0] = torch.nan
    out = measured(AttributionPatching("0"), model, td)
    assert out["top_part"][:, 0].tolist() == [2, 1, 0]
    assert out["top_estimate"][:2, 0].isfinite().all()
    assert out["top_estimate"][2].isnan()


def test_a_layer_without_parts_of_the_kind_has_no_agreement():
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)).double()
    td = pairs(2, 4)
    out = measured(AttributionPatching(("0", "3"), parts=("layer", "position")), model, td)
    assert out["agreement"][0].isfinite().all()
    assert out["agreement"][1].isnan().all()
    assert out["agreement_overall"].isfinite().all()


def test_targets_that_a_layer_does_not_reach():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return torch.cat([self.left(x), self.right(x)], 1)

    out = measured(AttributionPatching(("left", "right")), Two().double(), pairs(3))
    assert out["effect"][0, 2:].eq(0).all()
    assert out["effect"][1, :2].eq(0).all()
    assert out["agreement"][0, 2:].isnan().all()
    assert_close(out["agreement"][0, :2], torch.ones(2, dtype=torch.float64))
