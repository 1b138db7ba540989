"""Shapley values: kernel SHAP and sampling of orders, against all orders of small games, one by one."""

import itertools

import numpy as np
import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import FeatureAblation, KernelShap, ShapleySampling
from tdhook_train.errors import SettingsError


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def every_order(model, x, base, groups):
    """What each group adds, averaged over all orders: ``[row, target, group]``."""
    model, out = model.double(), []
    for row, instead in zip(x.double(), base.double(), strict=True):
        orders = list(itertools.permutations(range(len(groups))))
        inputs = []
        for order in orders:
            now = instead.clone()
            inputs.append(now.clone())
            for g in order:
                now[groups[g]] = row[groups[g]]
                inputs.append(now.clone())
        values = model(torch.stack(inputs)).detach().view(len(orders), len(groups) + 1, -1)
        share = torch.zeros(values.shape[2], len(groups), dtype=torch.float64)
        for gains, order in zip(values.diff(dim=1), orders, strict=True):
            for gain, g in zip(gains, order, strict=True):
                share[:, g] += gain / len(orders)
        out.append(share)
    model.float()
    return torch.stack(out).float()


def test_few_groups_are_solved_exactly():
    model, x, base = mlp(5, 16, 3), torch.randn(4, 5), torch.randn(4, 5)
    td = TensorDict({"input": x, "baseline": {"input": base}}, [4])
    found = measured(KernelShap(), model, td)["attr", "input"]
    expected = every_order(model, x, base, [[i] for i in range(5)])
    assert_close(found, expected, atol=2e-6, rtol=1e-5)
    named = measured(KernelShap(groups={"a": [0, 3], "b": [4]}), model, td)
    expected = every_order(model, x, base, [[0, 3], [4], [1, 2]])
    assert_close(named["shares"], expected, atol=2e-6, rtol=1e-5)
    assert_close(named["attr", "input"], expected[..., [0, 2, 2, 0, 1]], atol=2e-6, rtol=1e-5)


class Game(nn.Module):
    """Features 0 and 1 are alike, 2 only matters where 0 is there, 3 never does; the second output is linear."""

    def forward(self, x):
        a, b, c, d = x.unbind(-1)
        linear = 2 * a - b + 3 * c
        return torch.stack([a * b + a + b + c * a * b + 0 * d, linear, a * b + a + b + c * a * b + linear], -1)


@pytest.mark.parametrize("method", [KernelShap(), ShapleySampling(permutations=500)], ids=["kernel", "sampling"])
def test_the_axioms(method):
    x = torch.ones(3, 4)
    found = measured(method, Game(), td_of(input=x))["attr", "input"]
    exact = isinstance(method, KernelShap)
    noise = 1e-6 if exact else 0.1  # 4 standard errors of 500 orders, of gains that differ by at most 1
    assert_close(found.sum(2), Game()(x), atol=1e-5, rtol=0)  # efficiency
    assert_close(found[:, 0, 0], found[:, 0, 1], atol=2 * noise, rtol=0)  # symmetry
    assert found[:, :, 3].abs().max() < 1e-6  # dummy
    assert_close(found[:, 0] + found[:, 1], found[:, 2], atol=1e-5, rtol=0)  # additivity
    assert_close(found[:, 1], torch.tensor([[2.0, -1, 3, 0]]).expand(3, 4), atol=1e-5, rtol=0)
    # a, b: 1 + 1/2 + 1/3; c: 1/3
    assert_close(found[:, 0], torch.tensor([[11 / 6, 11 / 6, 1 / 3, 0]]).expand(3, 4), atol=noise, rtol=0)


@pytest.mark.parametrize("kind", [KernelShap, ShapleySampling])
def test_one_group_has_all(kind):
    model, x = mlp(3, 8, 2), torch.randn(4, 3)
    found = measured(kind(groups={"all": [0, 1, 2]}), model, td_of(input=x))["shares"]
    assert_close(found[..., 0], (model(x) - model(torch.zeros(4, 3))).detach())


def test_orders_drawn_at_random_come_near_to_all_of_them():
    model, x = mlp(5, 16, 3), torch.randn(3, 5)
    expected = every_order(model, x, torch.zeros(3, 5), [[i] for i in range(5)])
    errors = []
    for permutations in (40, 4000):
        found = measured(ShapleySampling(permutations=permutations), model, td_of(input=x))["attr", "input"]
        assert_close(found.sum(2), (model(x) - model(torch.zeros(3, 5))).detach(), atol=1e-5, rtol=0)
        errors.append((found - expected).abs().mean())
    assert errors[1] < 0.25 * errors[0]  # a tenth is expected
    assert errors[1] < 0.02 * expected.abs().mean()


def test_orders_drawn_at_random_as_the_same_orders_by_hand(monkeypatch):
    model, x = mlp(4, 8, 2), torch.randn(2, 4)
    ranks = torch.stack([torch.stack([torch.randperm(4) for _ in range(3)]) for _ in range(2)])
    monkeypatch.setattr("tdhook_train.explain.problem.Problem.drawn", lambda *_: ranks)
    found = measured(ShapleySampling(permutations=3), model, td_of(input=x))["attr", "input"]
    expected = torch.zeros_like(found)
    for i, j in itertools.product(range(2), range(3)):
        now = torch.zeros(4)
        for feature in ranks[i, j].argsort().tolist():
            before = model(now)
            now[feature] = x[i, feature]
            expected[i, :, feature] += (model(now) - before).detach() / 3
    assert_close(found, expected, atol=1e-6, rtol=1e-5)


class Pairs(nn.Module):
    """A polynomial of second order, whose Shapley values are known: half of what a pair adds goes to each."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Parameter(torch.randn(width))
        self.pairs = nn.Parameter(torch.randn(width, width).triu(1) / width)

    def forward(self, x):
        return ((x @ self.linear) + ((x @ self.pairs) * x).sum(-1))[..., None]

    def shapley(self, x):
        both = (self.pairs + self.pairs.T) * x[:, :, None] * x[:, None]
        return (x * self.linear + both.sum(2) / 2).detach()


def test_many_groups_are_sampled_in_pairs():
    model, x = Pairs(16), torch.randn(4, 16)
    found = measured(KernelShap(samples=200, targets="output"), model, td_of(input=x))["attr", "input"]
    # a coalition and its complement together lose what is of second order: exact with any number of pairs that suffices
    assert_close(found, model.shapley(x), atol=1e-4, rtol=0)
    assert_close(found.sum(1), model(x)[:, 0].detach(), atol=1e-5, rtol=0)
    tanh, y = mlp(14, 16, 1), torch.randn(2, 14)
    exact = measured(KernelShap(samples=2**14), tanh, td_of(input=y))["attr", "input"]
    errors = [
        (measured(KernelShap(samples=n), tanh, td_of(input=y))["attr", "input"] - exact).abs().mean()
        for n in (300, 6000)
    ]
    assert errors[1] < 0.5 * errors[0] < 0.1 * exact.abs().mean()


def test_the_kernel_as_by_a_weighted_regression(monkeypatch):
    model, x = mlp(13, 8, 1), torch.randn(1, 13)
    kept = torch.rand(1, 60, 13) < 0.5
    monkeypatch.setattr("tdhook_train.explain.problem.Problem.drawn", lambda *_: kept)
    found = measured(KernelShap(samples=120), model, td_of(input=x))["attr", "input"][0, 0]
    z = torch.cat([kept, ~kept], 1)[0]
    empty, whole = model(torch.zeros(1, 13)).item(), model(x).item()
    y = (model(z * x)[:, 0].detach() - empty).numpy()
    # the constraint takes the place of the last coefficient
    columns, left = (z[:, :-1].double() - z[:, -1:].double()).numpy(), y - z[:, -1].numpy() * (whole - empty)
    fit = np.linalg.lstsq(columns, left, rcond=None)[0]
    expected = np.append(fit, whole - empty - fit.sum())
    assert_close(found.numpy(), expected.astype(np.float32), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "method", [KernelShap(samples=64), ShapleySampling(permutations=4)], ids=["kernel", "sampling"]
)
def test_rows_do_not_mix_and_passes_do_not_matter(method):
    model, x = mlp(9, 8, 2), torch.randn(7, 9)
    whole = measured(method, model, td_of(input=x))["attr", "input"]
    cut = type(method)(**{**vars(method), "max_bytes": 2000})
    assert_close(measured(cut, model, td_of(input=x))["attr", "input"], whole)
    other = torch.cat([x[:3], torch.randn(4, 9)])
    assert_close(measured(method, model, td_of(input=other))["attr", "input"][:3], whole[:3])
    one = measured(method, model, td_of(input=x[:1]))["attr", "input"]
    assert_close(one, whole[:1])


@pytest.mark.parametrize(
    "method",
    [FeatureAblation(), KernelShap(samples=64), ShapleySampling(permutations=4)],
    ids=lambda m: type(m).__name__,
)
def test_groups_numbered_row_by_row_do_not_go_by_how_rows_are_cut(method):
    model, x = mlp(9, 8, 2), torch.randn(4, 9)
    ids = torch.stack([torch.zeros(9), torch.arange(9) // 3, torch.arange(9), torch.arange(9) // 8]).long()
    td = TensorDict({"input": x, "groups": {"input": ids}}, [4])
    whole = measured(method, model, td)["attr", "input"]
    cut = type(method)(**{**vars(method), "max_bytes": 200})
    assert_close(measured(cut, model, td)["attr", "input"], whole)
    rise = (model(x) - model(torch.zeros(4, 9))).detach()
    assert_close(whole[0], rise[0, :, None].expand(2, 9), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [KernelShap, ShapleySampling])
def test_several_inputs_layers_masks_and_tokens(kind):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, tokens, x):
            return self.mix(self.table(tokens).sum(1)) + x.sum((1, 2))[:, None]

    model, tokens, x = Two(), torch.randint(1, 7, (3, 4)), torch.randn(3, 2, 2)
    mask = torch.tensor([[True, True, True, False]]).expand(3, 4)
    td = TensorDict(
        {"tokens": tokens, "x": x, "baseline": {"tokens": torch.zeros_like(tokens)}, "mask": {"tokens": mask}}, [3]
    )
    with kind().prepare(model, ["tokens", "x"], ["o"]) as hooked:
        found = hooked(td)
    per_token = (model.table(tokens) - model.table.weight[0]) @ model.mix.weight.T
    expected = (per_token * mask[..., None]).mT.detach()
    assert_close(found["attr", "tokens"], expected, atol=1e-5, rtol=1e-5)
    assert_close(found["attr", "x"], x[:, None].expand(3, 2, 2, 2), atol=1e-5, rtol=1e-5)
    with kind(layers="mix", targets=("o", 1)).prepare(model, ["tokens", "x"], ["o"]) as hooked:
        found = hooked(td)["attr", "mix"]
    rise = (model.table(tokens) - model.table.weight[0]).sum(1) @ model.mix.weight[1]  # from the baseline's tokens
    assert_close(found, torch.stack([torch.zeros(3), rise.detach()], 1), atol=1e-5, rtol=1e-5)


def test_several_references_are_averaged_over():
    model, x, base = mlp(4, 8, 2), torch.randn(3, 4), torch.randn(3, 5, 4)
    found = measured(KernelShap(), model, TensorDict({"input": x, "baseline": {"input": base}}, [3]))["attr", "input"]
    each = [every_order(model, x, one, [[i] for i in range(4)]) for one in base.unbind(1)]
    assert_close(found, torch.stack(each).mean(0), atol=2e-6, rtol=1e-5)


def test_what_does_not_look_has_exactly_0():
    model = nn.Sequential(nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    for method in (KernelShap(), KernelShap(samples=4), ShapleySampling()):
        assert measured(method, model, td_of(input=torch.randn(4, 3)))["attr", "input"].eq(0).all()


def test_settings_that_do_not_fit():
    with pytest.raises(SettingsError, match="KernelShap needs samples of 2 or more, got 1"):
        KernelShap(samples=1)
    with pytest.raises(SettingsError, match="ShapleySampling needs permutations of 1 or more, got 0"):
        ShapleySampling(permutations=0)


def test_the_values_of_captum():
    captum = pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")
    model, x, base = mlp(5, 16, 2), torch.randn(3, 5), torch.randn(3, 5)
    td = TensorDict({"input": x, "baseline": {"input": base}}, [3])
    found = measured(KernelShap(targets=("output", 1)), model, td)["attr", "input"]
    expected = captum.ShapleyValues(model).attribute(x, base, target=1)
    assert_close(found, expected, atol=1e-5, rtol=0)
    torch.manual_seed(0)
    sampled = captum.ShapleyValueSampling(model).attribute(x, base, target=1, n_samples=300)
    ours = measured(ShapleySampling(targets=("output", 1), permutations=300), model, td)["attr", "input"]
    assert (ours - found).abs().mean() < 1.5 * (sampled - found).abs().mean() < 0.1 * found.abs().mean()
    fitted = captum.KernelShap(model).attribute(x, base, target=1, n_samples=3000)
    assert (fitted - found).abs().mean() < 0.1 * found.abs().mean()
