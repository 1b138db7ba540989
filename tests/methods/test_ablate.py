"""Units held at a value: what is given out by hand-made networks whose weights say the same."""

import copy

import pytest
import torch
from method_cases import batch, mlp
from tensordict import TensorDict
from torch import nn

from tdhook_train.errors import SettingsError
from tdhook_train.latent import Ablate


def output(edit, model, td):
    with edit.prepare(model), torch.no_grad():
        return model(td["input"])


@pytest.mark.parametrize(("units", "to"), [(1, 0.0), ((0, 3), 0.25), ([3, 0], (0.5, -2.0)), (None, 0.0), (None, 1.5)])
def test_a_held_unit_is_a_unit_whose_weights_are_gone(units, to):
    model, td = mlp(3, 5, 2), batch()
    chosen = range(5) if units is None else [units] if isinstance(units, int) else units
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for unit, value in zip(chosen, to if isinstance(to, tuple) else [to] * len(list(chosen)), strict=True):
            by_hand[2].bias += by_hand[2].weight[:, unit] * value
            by_hand[2].weight[:, unit] = 0
        expected = by_hand(td["input"])
        intact = model(td["input"])
    assert torch.allclose(output(Ablate("1", units=units, to=to), model, td), expected, atol=1e-6)
    assert not torch.allclose(expected, intact)
    assert torch.equal(model(td["input"]), intact)


def test_the_units_of_an_image_layer_are_its_channels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with Ablate("1", units=2, to=7.0).prepare(model):
        given = model(torch.randn(5, 3, 8, 8))
    assert (given[:, 2] == 7).all()
    assert not (given[:, [0, 1, 3]] == 7).any()


def test_the_members_of_an_ensemble_are_all_ablated():
    members = [mlp(3, 5, 2) for _ in range(3)]
    stacked = TensorDict.from_modules(*members, as_module=False).data
    net, x = mlp(3, 5, 2), torch.randn(4, 3)

    def one(weights):
        with weights.to_module(net):
            return net(x)

    with Ablate("1", units=(0, 1)).prepare(net):
        found = torch.vmap(one)(stacked)
    for member, given in zip(members, found, strict=True):
        with Ablate("1", units=(0, 1)).prepare(member):
            assert torch.allclose(given, member(x), atol=1e-6)


def test_a_unit_that_a_layer_has_not_is_named():
    model = mlp(3, 5, 2)
    cases = (
        (Ablate("1", units=5), "units 0 to 4, not 5"),
        (Ablate("1", to=(0.0, 1.0)), "of 5 units of the layer, got 2"),
    )
    for edit, said in cases:
        with pytest.raises(SettingsError, match=said), edit.prepare(model):
            model(torch.zeros(1, 3))
    with pytest.raises(SettingsError, match="each of 1 units, got 2"):
        Ablate("1", units=3, to=(0.0, 1.0))
    assert all(not module._forward_hooks for module in model.modules())
