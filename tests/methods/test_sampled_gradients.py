"""SmoothGrad, SquareGrad, VarGrad and GradientShap: closed forms, loops over the very points, and captum."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import (
    GradientShap,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
    SquareGrad,
    VarGrad,
)

NOISY = (SmoothGrad, SquareGrad, VarGrad)


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


class Function(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


def points_of(method, model, td):
    """Where the method differentiates: what the model is called with in its graph, and what the method finds."""
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]) if args[0].requires_grad else None)
    found = measured(method, model, td)
    handle.remove()
    return torch.cat(seen).detach(), found


def gradient(model, points, target):
    points = points.clone().requires_grad_()
    return torch.autograd.grad(model(points)[:, target].sum(), points)[0]


@pytest.mark.parametrize(
    ("kind", "summary"),
    [
        (SmoothGrad, lambda g: g.mean(0)),
        (SquareGrad, lambda g: (g**2).mean(0)),
        (VarGrad, lambda g: ((g - g.mean(0)) ** 2).mean(0)),
    ],
)
def test_each_is_the_moment_of_gradients_at_the_very_points(kind, summary):
    model, x = mlp(3, 16, 2), torch.randn(5, 3)
    for i in range(5):
        points, found = points_of(kind(samples=7, noise=0.3), model, td_of(input=x[i : i + 1]))
        assert len(points) == 7
        for target in range(2):
            expected = summary(gradient(model, points, target))
            assert_close(found["attr", "input"][0, target], expected)


def test_the_noise_is_the_share_of_the_range_that_was_asked_for():
    x = torch.tensor([[0.0, 1.0, 10.0], [0.0, 0.1, -0.3]])
    for row, deviation in ((x[:1], 2.0), (x[1:], 0.08)):
        points, _ = points_of(SmoothGrad(samples=20_000, noise=0.2), nn.Linear(3, 1), td_of(input=row))
        noise = points - row
        assert_close(noise.std(0), torch.full((3,), deviation), rtol=0.03, atol=0)  # error of 20,000 draws: 0.5 %
        assert noise.mean(0).abs().max() < 0.04 * deviation
        assert noise.T.corrcoef().sub(torch.eye(3)).abs().max() < 0.04


def test_a_quadratic_in_closed_form():
    # ∂(Σ a x²)/∂x = 2 a x: its mean at x + ε is 2 a x, its variance 4 a² σ²
    a, x = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[0.0, 1.0, 2.0]])
    model, sigma = Function(lambda x: (a * x**2).sum(1, keepdim=True)), 0.1 * 2
    smooth, square, var = (
        measured(kind(samples=20_000, noise=0.1), model, td_of(input=x))["attr", "input"][0, 0] for kind in NOISY
    )
    assert_close(smooth, 2 * a * x[0], atol=0.02, rtol=0)  # 4 standard errors of 20,000 draws are 0.02
    assert_close(var, 4 * a**2 * sigma**2, rtol=0.05, atol=0)  # and of a variance 4 %
    assert_close(square, smooth**2 + var)


def test_a_linear_model_has_its_weights_and_no_variance():
    model, td = nn.Linear(4, 3), td_of(input=torch.randn(5, 4))
    weight = model.weight.detach().expand(5, 3, 4)
    for kind, expected in ((SmoothGrad, weight), (SquareGrad, weight**2), (VarGrad, 0 * weight)):
        assert_close(measured(kind(), model, td)["attr", "input"], expected)


def test_without_noise_it_is_the_gradient():
    model, td = mlp(3, 8, 2), td_of(input=torch.randn(6, 3))
    found = measured(SmoothGrad(noise=0.0, samples=3), model, td)["attr", "input"]
    assert_close(found, measured(Saliency(), model, td)["attr", "input"])


@pytest.mark.parametrize("make", [*(lambda kind=kind, **s: kind(noise=0.3, **s) for kind in NOISY), GradientShap])
def test_what_is_drawn_for_a_row_does_not_go_by_how_rows_are_cut(make):
    model, td = mlp(3, 8, 2), td_of(input=torch.randn(20, 3))
    whole = measured(make(), model, td)["attr", "input"]
    row = 4 * 2 * (8 + 8 + 2 + 2)  # bytes
    for rows in (1, 7):
        assert_close(measured(make(max_bytes=rows * row), model, td)["attr", "input"], whole)
    one = measured(make(targets=("output", 1)), model, td)["attr", "input"]
    assert_close(one, whole[:, 1])


@pytest.mark.parametrize("kind", [*NOISY, GradientShap])
def test_two_rows_alike_draw_apart(kind):
    model, x = mlp(3, 8, 2), torch.randn(1, 3)
    found = measured(kind(), model, td_of(input=x.expand(2, 3).clone()))["attr", "input"]
    assert not torch.allclose(found[0], found[1])


def test_masked_parts_get_no_noise():
    x = torch.randn(1, 4)
    mask = torch.tensor([[True, False, True, False]])
    td = TensorDict({"input": x, "mask": {"input": mask}}, [1])
    points, found = points_of(VarGrad(), mlp(4, 8, 1), td)
    moved = (points != x).any(0)
    assert moved.tolist() == mask[0].tolist()
    assert (found["attr", "input"][0, 0] != 0).tolist() == mask[0].tolist()


@pytest.mark.parametrize("kind", [*NOISY, GradientShap])
def test_two_inputs_of_different_ranks_draw_apart(kind):
    model = Function(lambda x, y: (x.square() * y.cos().sum((1, 2))[:, None]).sum(1, keepdim=True))
    x, y = torch.rand(4, 12), torch.rand(4, 3, 4)
    with kind(samples=5).prepare(model, ["x", "y"], ["o"]) as hooked:
        out = hooked(td_of(x=x, y=y))
    assert out["attr", "x"].shape == (4, 1, 12)
    assert out["attr", "y"].shape == (4, 1, 3, 4)
    same = Function(lambda x, y: (x.pow(3) + y.pow(3)).sum(1, keepdim=True))
    with kind(samples=5, noise=0.2).prepare(same, ["x", "y"], ["o"]) as hooked:
        out = hooked(td_of(x=x, y=x.clone()))
    assert (out["attr", "x"] - out["attr", "y"]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [*NOISY, GradientShap])
def test_by_a_layer_as_by_the_inputs_of_what_comes_after_it(kind):
    model, x = mlp(3, 8, 6, 2), torch.randn(5, 3)
    given = model[:2](x).detach()
    found = measured(kind(layers="1"), model, td_of(input=x))["attr", "1"]
    assert_close(found, measured(kind(), model[2:], td_of(input=given))["attr", "input"])


# ---------------------------------------------------------------------- expected gradients


def with_references(x, references):
    return TensorDict({"input": x, "baseline": {"input": references}}, [len(x)])


def test_a_linear_model_has_its_weights_times_the_way_from_the_mean_reference():
    model, x, references = nn.Linear(4, 3), torch.randn(5, 4), torch.randn(5, 6, 4)
    out = measured(GradientShap(samples=6), model, with_references(x, references))  # each reference once
    assert_close(out["attr", "input"], (model.weight * (x - references.mean(1))[:, None]).detach())
    assert_close(out["delta"], torch.zeros(5, 3), atol=1e-5, rtol=0)


def test_each_reference_is_drawn_as_often_as_the_next():
    x, references = torch.zeros(1, 1), torch.tensor([[[1.0], [-2.0], [4.0]]])
    points, out = points_of(GradientShap(samples=9), nn.Linear(1, 1), with_references(x, references))
    sides = torch.tensor([(points.sign() == 1).sum(), (points.sign() == -1).sum()])
    assert sides.tolist() == [6, 3]
    assert_close(out["delta"], torch.zeros(1, 1), atol=1e-6, rtol=0)


def test_in_the_mean_it_is_integrated_gradients_over_the_references():
    model, x, references = mlp(3, 8, 2), torch.randn(3, 3), torch.randn(3, 4, 3)
    td = with_references(x, references)
    exact = measured(IntegratedGradients(), model, td)["attr", "input"]
    found = measured(GradientShap(samples=20_000), model, td)
    size = float(exact.abs().max())
    assert_close(found["attr", "input"], exact, atol=0.02 * size, rtol=0)  # 20,000 draws: 0.7 % of their spread
    rough = measured(GradientShap(samples=4), model, td)
    total = rough["attr", "input"].sum(2)
    rise = model(x) - model(references.flatten(0, 1)).unflatten(0, (3, 4)).mean(1)
    assert_close(rough["delta"], (total - rise).detach())


def test_other_rows_are_references():
    model, x = nn.Linear(3, 1), torch.randn(200, 3)
    found = measured(GradientShap(baseline="rows", references=50, samples=50), model, td_of(input=x))["attr", "input"]
    expected = (model.weight * (x - x.mean(0))).detach()[:, None]
    assert (found - expected).abs().mean() < 0.3 * expected.abs().mean()


def test_the_moments_of_captum(monkeypatch):
    captum = pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")
    model, x = mlp(4, 16, 2), torch.randn(1, 4)
    tunnel = captum.NoiseTunnel(captum.Saliency(model))
    for kind, name in zip(NOISY, ("smoothgrad", "smoothgrad_sq", "vargrad"), strict=True):
        points, found = points_of(kind(samples=50, targets=("output", 1)), model, td_of(input=x))
        monkeypatch.setattr(torch, "normal", lambda *_, noise=points - x: noise)  # what we drew
        expected = tunnel.attribute(x, nt_type=name, nt_samples=50, target=1, abs=False)
        assert_close(found["attr", "input"], expected, atol=1e-5, rtol=0)


def test_the_expected_gradients_of_captum(monkeypatch):
    captum = pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")
    import numpy as np

    model, x, reference = mlp(4, 16, 2), torch.randn(1, 4), torch.randn(1, 4)
    method = GradientShap(samples=30, targets=("output", 1))
    points, found = points_of(method, model, with_references(x, reference))
    at = ((points - reference) / (x - reference)).mean(1).double().numpy()
    monkeypatch.setattr(np.random, "uniform", lambda *_: at)  # where we were on the path
    expected, delta = captum.GradientShap(model).attribute(
        x, reference, n_samples=30, stdevs=0.0, target=1, return_convergence_delta=True
    )
    assert_close(found["attr", "input"], expected.float(), atol=1e-5, rtol=0)
    assert_close(found["delta"][0], delta.float().mean(), atol=1e-5, rtol=0)
