"""Sobol indices, against functions whose indices are known."""

from math import pi

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import Sobol
from tdhook_train.errors import KeyMissingError, SettingsError


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


class Ishigami(nn.Module):
    """sin u + 7 sin² v + 0.1 w⁴ sin u on [-π, π]³."""

    def forward(self, x):
        u, v, w = (pi * (2 * x - 1)).unbind(-1)
        return (u.sin() + 7 * v.sin() ** 2 + 0.1 * w**4 * u.sin())[..., None]


class Product(nn.Module):
    """Sobol's g function: the product of (|4x - 2| + a) / (1 + a)."""

    a = torch.tensor([0.0, 1.0, 4.5, 9.0])

    def forward(self, x):
        return (((4 * x - 2).abs() + self.a) / (1 + self.a)).prod(-1, keepdim=True)


def ishigami():
    a, b = 7.0, 0.1
    first = 0.5 * (1 + b * pi**4 / 5) ** 2
    both = b**2 * pi**8 * (1 / 18 - 1 / 50)
    second = a**2 / 8
    total = first + second + both
    return torch.tensor([first + both, second, both]) / total


def product():
    part = 1 / (3 * (1 + Product.a) ** 2)
    every = (1 + part).prod()
    return part * every / (1 + part) / (every - 1)


@pytest.mark.parametrize(("model", "expected"), [(Ishigami(), ishigami()), (Product(), product())], ids=["i", "g"])
def test_the_known_indices(model, expected):
    x = torch.ones(2, len(expected))  # mixed with 0 by uniform shares: all of the unit cube
    found = measured(Sobol(samples=4096), model, td_of(input=x))["attr", "input"]
    assert_close(found, expected.expand_as(found), atol=0.01, rtol=0)


def test_a_linear_network_in_closed_form():
    model, x, base = nn.Linear(4, 2), torch.randn(3, 4), torch.randn(3, 4)
    td = TensorDict({"input": x, "baseline": {"input": base}}, [3])
    found = measured(Sobol(samples=1024, groups={"a": [0, 1]}), model, td)
    parts = (model.weight * (x - base)[:, None]).detach()
    variance = torch.stack([parts[..., :2].sum(-1), parts[..., 2:].sum(-1)], -1).square()
    assert_close(found["shares"], variance / variance.sum(-1, keepdim=True), atol=0.01, rtol=0)


def test_as_by_hand_from_the_same_points(monkeypatch):
    model, x = mlp(3, 8, 2), torch.randn(2, 3)
    points = torch.rand(2, 16, 6)
    monkeypatch.setattr("tdhook_train.explain.problem.Problem.drawn", lambda *_: points)
    found = measured(Sobol(samples=16), model, td_of(input=x))["attr", "input"]
    for row in range(2):
        a, b = points[row, :, :3], points[row, :, 3:]
        here = model(a * x[row]).detach()
        for i in range(3):
            c = a.clone()
            c[:, i] = b[:, i]
            there = model(c * x[row]).detach()
            for t in range(2):
                # Jansen: sum (f(A) - f(C))² / (2 N V)
                index = sum((p - q) ** 2 for p, q in zip(here[:, t], there[:, t], strict=True)) / 32 / here[:, t].var()
                assert_close(found[row, t, i], index, atol=1e-5, rtol=1e-4)


def test_rows_do_not_mix_and_passes_do_not_matter():
    model, x = mlp(4, 8, 2), torch.randn(7, 4)
    before = torch.get_rng_state()
    whole = measured(Sobol(samples=8), model, td_of(input=x))["attr", "input"]
    assert torch.equal(torch.get_rng_state(), before)
    for max_bytes in (200, 3000):
        cut = measured(Sobol(samples=8, max_bytes=max_bytes), model, td_of(input=x))["attr", "input"]
        assert_close(cut, whole, atol=1e-5, rtol=1e-4)
    other = torch.cat([x[:3], torch.randn(4, 4)])
    assert_close(measured(Sobol(samples=8), model, td_of(input=other))["attr", "input"][:3], whole[:3])


def test_what_is_masked_stays_and_an_image_is_cut_into_squares():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(32, 1)), torch.randn(2, 2, 4, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[:, :2, :2] = False
    td = TensorDict({"input": x, "mask": {"input": mask[:, None].expand(2, 2, 4, 4)}}, [2])
    found = measured(Sobol(samples=512, patch=2), model, td)["attr", "input"][:, 0, 0]
    parts = (model[1].weight.view(2, 4, 4) * x).detach().sum(1) * mask
    squares = parts.unfold(1, 2, 2).unfold(2, 2, 2).sum((-1, -2)).square()
    expected = squares / squares.sum((1, 2), keepdim=True)
    assert_close(found[:, ::2, ::2], expected, atol=0.02, rtol=0)
    assert found[:, :2, :2].eq(0).all()


def test_what_does_not_vary_has_0_and_tokens_have_nothing_between():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    assert measured(Sobol(), model, td_of(input=torch.randn(4, 3)))["attr", "input"].eq(0).all()
    with pytest.raises(KeyMissingError, match=r"Sobol needs a floating-point input.*layers='0'"):
        measured(Sobol(), nn.Sequential(nn.Embedding(5, 2)), td_of(input=torch.zeros(2, 3, dtype=torch.long)))


def test_too_many_groups_are_refused():
    with pytest.raises(SettingsError, match="Sobol needs at most 10600 groups, got 10800: cut by patch="):
        measured(Sobol(samples=2, targets=("output", 0)), nn.Flatten(), td_of(input=torch.zeros(1, 3, 60, 60)))
