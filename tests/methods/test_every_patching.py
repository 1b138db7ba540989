"""What holds for every patching, exact or estimated: on odd data, on several networks, without gradients."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close

from tdhook_train.circuits import RelP
from tdhook_train.hooks import HookedModel
from tdhook_train.latent import ActivationPatching, AttributionPatching
from tdhook_train.method import Part, Seen, look

METHODS = {kind.__name__: kind for kind in (ActivationPatching, AttributionPatching, RelP)}
ESTIMATES = {name: METHODS[name] for name in ("AttributionPatching", "RelP")}
PATCHED = ("effect", "unit_effect", "normalised", "unit_normalised")

each = pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
each_estimate = pytest.mark.parametrize("kind", ESTIMATES.values(), ids=ESTIMATES)


def pairs(n=6, width=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return TensorDict(
        {key: torch.randn(n, width, generator=g, dtype=torch.float64) for key in ("input", ("source", "input"))}, [n]
    )


def net(*widths):
    return mlp(*(widths or (3, 6, 4, 2))).double()


def same(one, other, **close):
    assert set(one.keys(True, True)) == set(other.keys(True, True))
    for key in one.keys(True, True):
        assert_close(one[key], other[key], equal_nan=True, **close)


@each
def test_a_state_patched_with_itself_gives_nothing(kind):
    td = pairs()
    td["source", "input"] = td["input"].clone()
    out = measured(kind(), net(), td)
    assert (out["effect"] == 0).all()
    assert (out["unit_effect"].nan_to_num() == 0).all()
    assert (out["gap"] == 0).all()
    assert out["normalised"].isnan().all()  # a share of nothing


@each
def test_a_whole_layer_of_a_linear_chain_gives_the_gap(kind):
    model, td = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)).double(), pairs()
    out = measured(kind(way="both"), model, td)
    gap = (model(td["source", "input"]) - model(td["input"])).abs().mean(0).detach()
    for ending in ("", "_denoise"):
        assert_close(out[f"effect{ending}"], gap.expand(3, 2))
        assert_close(out[f"normalised{ending}"], torch.ones(3, 2).double())


@each
def test_units_that_a_layer_does_not_have_are_not_a_number(kind):
    out = measured(kind(), net(), pairs())
    for i, width in enumerate((6, 6, 4, 4, 2)):
        for key in ("unit_effect", "unit_normalised"):
            assert out[key][i, :width].isfinite().all()
            assert out[key][i, width:].isnan().all()


@each
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_shows_and_does_not_fail(kind, bad):
    td = pairs()
    td["input"][2] = bad
    out = measured(kind(parts=("layer", "unit", "position")), net(), td)
    first = out["effect"][0]
    assert first.isnan().all() or (first.isinf() | (first > 0)).all()  # never a silent zero
    assert out["unit_effect"].shape == (5, 6, 2)
    assert out["position_effect"].shape == (5, 0, 2)  # of which these layers have none
    assert torch.isfinite(measured(kind(), net(), td[:2])["effect"]).all()  # and not beyond its own pairs


@each
def test_activations_that_do_not_vary(kind):
    model, td = net(), pairs()
    for parameter in model[0].parameters():
        nn.init.zeros_(parameter)
    out = measured(kind(), model, td)
    assert (out["effect"] == 0).all()
    assert (out["unit_effect"].nan_to_num() == 0).all()
    assert out["normalised"].isnan().all()
    for key in {"agreement", "agreement_overall"} & set(out.keys()):
        assert out[key].isnan().all()


@each
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_same(kind, mode):
    model, td = net(), pairs()
    expected = measured(kind(), model, td)
    with mode():
        same(measured(kind(), model, td.clone()), expected, rtol=0, atol=0)


@each
def test_parameters_that_are_frozen_change_nothing(kind):
    model, td = net(), pairs()
    expected = measured(kind(), model, td)
    same(measured(kind(), model.requires_grad_(False), td), expected, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def part(name, model, td):
    hooked = HookedModel(TensorDictModule(model, ["input"], [f"{name}_out"]), name=name)
    hooked.trace(td)
    values, outputs = look(hooked, td, [])
    batch = td.copy().update(outputs)
    return Part(Seen(batch, values, generator=torch.Generator().manual_seed(0)), hooked)


@each
def test_two_networks_together_are_each_alone(kind):
    td, models = pairs(), {"actor": net(3, 6, 2), "critic": net(3, 9, 5, 2)}
    method = kind(parts=("layer", "unit", "position"), verify=3) if kind in ESTIMATES.values() else kind()
    together = method.across({name: part(name, model, td) for name, model in models.items()})
    assert together.labels["layer"] == [f"actor.module.{i}" for i in range(3)] + [
        f"critic.module.{i}" for i in range(5)
    ]
    for name, rows, columns in (("actor", slice(0, 3), slice(0, 2)), ("critic", slice(3, 8), slice(2, 4))):
        alone = method.across({name: part(name, models[name], td)})
        for key in PATCHED:
            value = alone.values[key]
            among = together.values[key][rows]
            among = among[..., columns] if among.shape[-1] == 4 else among
            among = among[:, : value.shape[1]] if value.ndim == 3 else among
            assert_close(among, value, equal_nan=True)
            assert value.isfinite().any()


@each_estimate
def test_estimates_are_of_the_changes_that_exact_patching_makes(kind):
    """Of one pair repeated, whose means are its own values."""
    model, td = net(), pairs(1)[[0] * 4]
    found, exact = measured(kind(verify=4, sample=100), model, td), measured(ActivationPatching(), model, td)
    for rank in range(4):
        layer, unit = found["top_layer"][rank, 0], found["top_part"][rank, 0]
        assert_close(found["top_exact"][rank, 0], exact["unit_effect"][layer, unit, 0])
    assert_close(found["top_estimate"], found["unit_effect"].nan_to_num().flatten(0, 1).topk(4, 0).values)
    signed = [out["unit_normalised"].flatten(0, 1) for out in (found, exact)]  # a change times the sign of the gap
    for i in range(2):
        a, b = (values[:, i][values[:, i].isfinite()] for values in signed)
        assert_close(found["agreement_overall"][i], torch.corrcoef(torch.stack([a, b]))[0, 1])


@each_estimate
def test_the_network_is_left_as_it_was(kind):
    model, td = net(), pairs()
    model(td["input"]).sum().backward()
    before = [(parameter.grad.clone(), parameter.requires_grad, parameter.clone()) for parameter in model.parameters()]
    measured(kind(), model, td)
    for parameter, (grad, needs, value) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)
        assert parameter.requires_grad == needs
        assert torch.equal(parameter, value)
    assert not any(value.requires_grad for value in td.values(True, True))
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
