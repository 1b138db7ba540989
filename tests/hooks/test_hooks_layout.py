"""Units are the channels of what a convolution gives out, with or without rows in front, and features elsewhere."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import HookedModel
from tdhook_train.health import DeadUnits, EffectiveRank
from tdhook_train.hooks.layout import unit_axis
from tdhook_train.latent import Ablate, ActivationPatching

CHANNELS = 3
SIDES = {1: (7,), 2: (7, 6), 3: (7, 6, 5)}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def convolved(dims):
    torch.manual_seed(0)
    pooling = getattr(nn, f"MaxPool{dims}d")(2)
    return nn.Sequential(CONVOLUTIONS[dims](2, CHANNELS, 3), nn.Tanh(), pooling, nn.Sequential(nn.Identity()))


@pytest.mark.parametrize("rows", [(), (4,)], ids=["no rows", "rows"])
@pytest.mark.parametrize("dims", CONVOLUTIONS)
@pytest.mark.parametrize("layer", ["0", "1", "2", "3.0"])
def test_a_channel_is_held_and_no_line_of_pixels(layer, dims, rows):
    net = convolved(dims)
    td = TensorDict(input=torch.randn(*rows, 2, *SIDES[dims]), batch_size=rows)
    expected, axis = net(td["input"]).detach(), -1 - dims
    with Ablate(layers=layer, units=1).prepare(net):
        found = net(td["input"]).detach()
    held = found.select(axis, 1)
    bare = 0.0 if layer != "0" else held.tanh()  # all that comes after gives 0 for 0
    assert torch.equal(held, torch.zeros_like(held) + bare)
    for channel in (0, 2):
        assert torch.equal(found.select(axis, channel), expected.select(axis, channel))


def test_units_of_layers_that_mix_features_are_the_last_in_any_number_of_dimensions():
    value = torch.randn(2, 3, 4, 5)  # such as batch, time, agents, features
    for module in (nn.Linear(5, 5), nn.LayerNorm(5), nn.GRU(5, 5)):
        assert unit_axis(value, module) == 3
    assert unit_axis(value) == 1
    assert unit_axis(torch.randn(2, 3, 4), nn.BatchNorm1d(3)) == 1


def test_an_activation_that_is_used_twice_or_stands_alone_keeps_what_its_shape_says():
    shared = nn.Tanh()
    net = nn.Sequential(nn.Conv2d(2, 3, 3), shared, nn.Flatten(), nn.Linear(60, 4), shared)
    hooked = HookedModel(net)
    assert hooked.unit_axis("1", torch.randn(3, 5, 4)) == 2
    assert hooked.unit_axis("0", torch.randn(3, 5, 4)) == 0
    assert HookedModel(nn.Sequential(nn.Tanh())).unit_axis("0", torch.randn(3, 5, 4)) == 2


@pytest.mark.parametrize("dims", CONVOLUTIONS)
def test_methods_count_the_channels_of_every_convolution(dims):
    net = convolved(dims)
    td = TensorDict(input=torch.randn(6, 2, *SIDES[dims]), batch_size=[6])
    with torch.no_grad():
        net[0].weight[1] = net[0].bias[1] = 0
    with DeadUnits(layers=["0", "1", "2"]).prepare(net) as hooked:
        found = hooked(td)
    assert found["dead_unit"].tolist() == [[0, 1, 0]] * 3
    with EffectiveRank(layers="0").prepare(net) as hooked:
        found = hooked(td)
    sigma = torch.linalg.svdvals(net[0](td["input"]).movedim(1, -1).reshape(-1, CHANNELS).double().detach())
    p = sigma[sigma > 1e-9] / sigma.sum()
    assert torch.allclose(found["effective_rank"][0], (-(p * p.log()).sum()).exp(), atol=1e-5)
    patching = ActivationPatching(layers=["0", "1"], targets={"sum": lambda out: out["output"].flatten(1).sum(1)})
    with patching.prepare(net) as hooked:
        found = hooked(td)
    assert found["unit_effect"].shape == (2, CHANNELS, 1)
    assert (found["unit_effect"][:, :, 0] == 0).tolist() == [[False, True, False]] * 2


class Apart(nn.Module):
    """Nothing says here that the activation keeps the dimensions of the convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv1d(2, CHANNELS, 3), nn.Tanh()

    def forward(self, x):
        return self.act(self.conv(x)).sum((1, 2))


def test_two_layers_are_patched_as_one_only_where_they_have_the_same_units():
    torch.manual_seed(0)
    net, td = Apart(), TensorDict(input=torch.randn(6, 2, 7), batch_size=[6])
    with ActivationPatching(layers=["conv", "act"]).prepare(net) as hooked:
        found = hooked(td)
    with torch.no_grad():
        acts = net.conv(td["input"]).tanh()
    change = acts.roll(-3, 0) - acts
    assert torch.allclose(found["unit_effect"][0, :CHANNELS, 0], change.sum(2).abs().mean(0), atol=1e-6)
    assert found["unit_effect"][0, CHANNELS:].isnan().all()
    assert torch.allclose(found["unit_effect"][1, :, 0], change.sum(1).abs().mean(0), atol=1e-6)
