"""Activation maximisation: gradient ascent against its closed form, and against a loop over targets."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import ActivationMaximisation
from tdhook_train.errors import KeyMissingError, SettingsError, TargetError


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def climbed(function, start, *, steps, lr, penalty=0.0, bounds=None):
    """One target by itself."""
    x = start.clone()
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(function(x) - penalty * (x**2).sum(), x)
        x = (x + lr * grad).detach()
        x = x if bounds is None else x.clamp(*bounds)
    return x


def test_a_linear_output_in_closed_form():
    """With a penalty p the way up is geometric: w / 2p · (1 - (1 - 2 p lr)^steps)."""
    model, td = nn.Linear(3, 2), td_of(input=torch.randn(4, 3))
    found = measured(ActivationMaximisation(penalty=0.2, lr=0.1, steps=30), model, td)
    weight = model.weight.detach()
    expected = weight / 0.4 * (1 - (1 - 2 * 0.2 * 0.1) ** 30)
    assert_close(found["optimum", "input"], expected, atol=1e-5, rtol=1e-4)
    assert_close(found["activation"], (expected * weight).sum(1) + model.bias.detach(), atol=1e-5, rtol=1e-4)
    assert_close(found["start"], model.bias.detach())


def test_each_target_as_if_alone_from_the_mean_within_bounds():
    model, x = mlp(3, 16, 2), torch.randn(20, 3)
    found = measured(ActivationMaximisation(start="mean", steps=15, lr=0.5, bounds=(-1.0, 0.8)), model, td_of(input=x))
    for i in range(2):
        start = x.mean(0).clamp(-1, 0.8)
        expected = climbed(lambda v, i=i: model(v[None])[0, i], start, steps=15, lr=0.5, bounds=(-1.0, 0.8))
        assert_close(found["optimum", "input"][i], expected, atol=1e-5, rtol=1e-4)
    assert found["optimum", "input"].max() <= 0.8
    assert (found["activation"] > found["start"]).all()


def test_units_of_a_layer_and_channels_by_their_mean():
    model, x = mlp(3, 6, 2), torch.randn(8, 3)
    method = ActivationMaximisation(layers=["0", "1"], units=(4, 1), steps=7)
    found = measured(method, model, td_of(input=x))["optimum", "input"]
    for row, (layers, unit) in enumerate([(1, 4), (1, 1), (2, 4), (2, 1)]):
        expected = climbed(lambda v, n=layers, u=unit: model[:n](v)[u], torch.zeros(3), steps=7, lr=0.1)
        assert_close(found[row], expected, atol=1e-6, rtol=1e-5)
    conv, image = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)), torch.randn(5, 1, 4, 4)
    found = measured(ActivationMaximisation(layers="1", steps=7), conv, td_of(input=image))["optimum", "input"]
    assert found.shape == (3, 1, 4, 4)
    for unit in range(3):
        expected = climbed(lambda v, u=unit: conv[:2](v)[u].mean(), torch.zeros(1, 4, 4), steps=7, lr=0.1)
        assert_close(found[unit], expected, atol=1e-6, rtol=1e-5)


def test_more_targets_than_go_at_once():
    model = mlp(3, 70, 1)
    found = measured(ActivationMaximisation(layers="0", steps=2), model, td_of(input=torch.randn(4, 3)))
    assert_close(found["optimum", "input"], 0.2 * model[0].weight.detach())


def test_noise_is_the_generators_and_each_targets_own():
    model, td, method = mlp(3, 6, 4), td_of(input=torch.randn(9, 3)), ActivationMaximisation(start="noise", steps=1)
    with method.prepare(model) as hooked:
        one, same, other = (
            hooked(td, generator=torch.Generator().manual_seed(seed))["optimum", "input"] for seed in (1, 1, 2)
        )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    first = measured(ActivationMaximisation(start="noise", steps=1, lr=1e-9, targets=[("output", 0)]), model, td)
    every = measured(ActivationMaximisation(start="noise", steps=1, lr=1e-9), model, td)
    assert_close(first["optimum", "input"][0], every["optimum", "input"][0])
    assert not torch.allclose(every["optimum", "input"][0], every["optimum", "input"][1])


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 2)

    def forward(self, image, speed, word):
        return (image.sum((1, 2)) * self.table(word)[:, 0] - (speed**2).sum(1))[:, None]


def test_several_inputs_of_different_ranks_beside_one_that_stays():
    model, keys = Two(), ["image", "speed", "word"]
    td = td_of(image=torch.randn(4, 2, 3), speed=torch.randn(4, 3), word=torch.tensor([3, 0, 1, 2]))
    method = ActivationMaximisation(start="mean", steps=10, lr=0.05, targets=("o", 0))
    out = measured(method, model, td, in_keys=keys, out_keys=["o"])
    slope = model.table.weight[3, 0].detach()
    assert_close(out["optimum", "image"][0], td["image"].mean(0) + 0.5 * slope, atol=1e-5, rtol=1e-4)
    assert_close(out["optimum", "speed"][0], td["speed"].mean(0) * 0.9**10, atol=1e-5, rtol=1e-4)


def test_grad_of_the_training_is_not_touched():
    model, td = mlp(3, 6, 2), td_of(input=torch.randn(4, 3))
    model(td["input"]).sum().backward()
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    for settings in ({}, {"layers": "1"}):
        measured(ActivationMaximisation(steps=3, **settings), model, td)
    for parameter, (grad, value) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, value)


def test_what_cannot_be_climbed_is_said():
    td = td_of(input=torch.randn(4, 3))
    with pytest.raises(SettingsError, match="takes targets or layers, not both"):
        ActivationMaximisation(targets="output", layers="0")
    with pytest.raises(SettingsError, match="needs layers for units"):
        ActivationMaximisation(units=(0,))
    with pytest.raises(TargetError, match="'0' has units 0 to 5, not 6"):
        measured(ActivationMaximisation(layers="0", units=(6,)), mlp(3, 6, 2), td)
    with pytest.raises(KeyMissingError, match=r"needs a floating-point input, Embedding reads \{'input': torch.int64"):
        measured(ActivationMaximisation(), nn.Embedding(5, 2), td_of(input=torch.arange(4)))
