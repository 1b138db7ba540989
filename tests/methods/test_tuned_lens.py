"""The tuned lens: against its objective solved otherwise, planted rotations, and the logit lens."""

import numpy as np
import pytest
import torch
from method_cases import measured
from scipy.optimize import minimize
from tensordict import TensorDict
from test_logit_lens import STREAM, Chosen, Language, Residual, inputs
from torch import nn

from tdhook_train import ArtifactBuffer, At, Observer, ProbeSet
from tdhook_train.latent import LogitLens, TunedLens
from tdhook_train.ops.folds import fold_of
from tdhook_train.ops.translator import Translator, by_lbfgs, by_ridge

PENALTY = 1e-2


def rotation(width, seed=0):
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]


def chosen(head, *values, groups=None, **settings):
    rows = len(values[0])
    td = TensorDict(input=torch.arange(float(rows))[:, None], batch_size=[rows])
    known = {} if groups is None else {"groups": groups}
    return measured(TunedLens("layers.*", "head", **settings), Chosen(head, *values), td, **known)


def planted(rows=300, width=6, noise=0.0):
    """A layer that says all that the last one says, in other directions and at another place and size."""
    last = torch.randn(rows, width)
    return 3 * last @ rotation(width) + 2 + noise * torch.randn(rows, width), last


class Wrapped(nn.Module):
    """A linear head that does not look like one."""

    def __init__(self, head):
        super().__init__()
        self.inner = head

    def forward(self, x):
        return self.inner(x)


# ------------------------------------------------------------------------------------------------- the fit


def scaled(layer, stream):
    """The coordinates in which the penalty counts, written out."""
    z = (layer - layer.mean(0)) / (layer - layer.mean(0)).pow(2).mean().sqrt()
    return z, (stream - stream.mean(0)).pow(2).mean().sqrt()


@pytest.mark.parametrize("outputs", [1, 3, 7])
def test_ridge_solves_the_normal_equations_of_all_weights_at_once(outputs):
    layer, stream, y, head = (torch.randn(*shape).double() for shape in ((40, 4), (40, 4), (40, outputs), (outputs, 4)))
    z, size = scaled(layer, stream)
    found = by_ridge(Translator.identity(layer, stream), layer, y, head, PENALTY)
    # y_no = size Σ_ij head_oi (Θ_ij z_nj + b_i): one row of the design for each row and output
    design = size * torch.einsum("oi,nj->noij", head, torch.cat([z, torch.ones(40, 1)], 1)).reshape(-1, 20)
    held = PENALTY * torch.tensor([1.0, 1, 1, 1, 0] * 4).double()
    expected = (torch.linalg.pinv(design.T @ design + held.diag()) @ (design.T @ y.flatten())).reshape(4, 5)
    torch.testing.assert_close(found.weight, expected[:, :4])
    torch.testing.assert_close(found.bias, expected[:, 4])


def test_lbfgs_comes_to_where_ridge_is():
    layer, stream, y, head = (torch.randn(*shape).double() for shape in ((60, 4), (60, 4), (60, 3), (3, 4)))
    start = Translator.identity(layer, stream)
    exact = by_ridge(start, layer, y - layer @ head.T, head, PENALTY)
    found, rests = by_lbfgs(start, lambda t: (y - t(layer) @ head.T).square().sum(), PENALTY, 200)
    assert rests
    torch.testing.assert_close(found.weight, exact.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found(layer) @ head.T, exact(layer) @ head.T, rtol=1e-4, atol=1e-5)
    assert not by_lbfgs(start, lambda t: (y - t(layer) @ head.T).square().sum(), PENALTY, 1)[1]


def test_kl_is_least_where_scipy_finds_it_least():
    layer, stream, head = torch.randn(50, 3).double(), torch.randn(50, 3).double(), nn.Linear(3, 4).double()
    final, (z, size) = head(stream).detach(), scaled(layer, stream)

    def objective(flat):
        weight, bias = torch.tensor(flat[:9]).view(3, 3), torch.tensor(flat[9:])
        p, q = (torch.distributions.Categorical(logits=v) for v in (final, head(layer + size * (z @ weight.T + bias))))
        divergence = torch.distributions.kl_divergence(p, q).mean()
        return float(divergence.detach()) + PENALTY * (flat[:9] ** 2).sum()

    best = minimize(objective, np.zeros(12), method="BFGS", options={"gtol": 1e-7})
    from_layer, _ = by_lbfgs(
        Translator.identity(layer, stream),
        lambda t: torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=final), torch.distributions.Categorical(logits=head(t(layer)))
        ).mean(),
        PENALTY,
        200,
    )
    found = objective(torch.cat([from_layer.weight.flatten(), from_layer.bias]).numpy())
    assert found == pytest.approx(best.fun, abs=1e-6)
    assert found < objective(np.zeros(12)) / 2


# ------------------------------------------------------------------------------------------------- what it reads


@pytest.mark.parametrize("wrap", [False, True])
def test_a_rotated_copy_is_recovered_where_the_logit_lens_is_blind(wrap):
    head = nn.Linear(6, 4)
    head.weight.data *= 3
    out = chosen(Wrapped(head) if wrap else head, *planted())
    assert out["kl_untuned"][0] > 1
    assert out["kl"][0] < 0.02
    assert out["agreement"][0] > 0.95
    assert out["agreement_untuned"][0] < 0.6
    assert out["converged"].tolist() == [1, 1]
    assert out["kl"][1] < 1e-6  # the last layer needs no translation
    assert out["kl_untuned"][1] == 0


def test_too_few_steps_are_said_and_scored_all_the_same():
    out = chosen(nn.Linear(6, 4), *planted(), steps=1)
    assert out["converged"].tolist() == [0, 1]
    assert out["kl"][0] < out["kl_untuned"][0]
    assert out["reason"].tolist() == [0, 0]


@pytest.mark.parametrize("wrap", [False, True])
def test_values_of_a_rotated_copy(wrap):
    head = nn.Linear(6, 1)
    out = chosen(Wrapped(head) if wrap else head, *planted(), output_is="values")
    assert out["r2_untuned"][0] < 0
    assert out["r2"].tolist() == pytest.approx([1, 1], abs=1e-3)
    assert out["converged"].tolist() == [1, 1]


def test_what_a_layer_does_not_know_is_not_read_out_of_it():
    _, last = planted()
    out = chosen(nn.Linear(6, 1), torch.randn(300, 6), last, output_is="values")
    assert out["r2"][0] < 0.1


@pytest.mark.parametrize("output_is", ["values", "logits"])
def test_a_head_that_is_not_seen_to_be_linear_gives_the_same(output_is):
    layer, last = planted(rows=80, noise=1.0)
    head = nn.Linear(6, 3)
    exact, slow = (chosen(one, layer, last, output_is=output_is, penalty=PENALTY) for one in (head, Wrapped(head)))
    torch.testing.assert_close(slow["lens"], exact["lens"], rtol=2e-2, atol=5e-3)


def test_each_row_is_read_by_what_was_fitted_to_other_trajectories():
    layer, last = planted(rows=40, noise=2.0)
    head, groups = nn.Linear(6, 2), torch.arange(40) // 5
    out = chosen(head, layer, last, groups=groups, folds=3, output_is="values", penalty=PENALTY)
    folds, y = fold_of(groups, 3), head(last).detach().double()
    for fold in range(3):
        train = folds != fold
        total = (y[train] - y[train].mean(0)).square().sum()
        start = Translator.identity(layer[train], last[train])
        missing = (y - head(layer).detach())[train]
        fitted = by_ridge(start, layer[train], missing, head.weight.detach(), PENALTY * float(total))
        expected = head(fitted(layer[~train]).float()).detach()
        torch.testing.assert_close(out["lens"][0, ~train], expected, rtol=1e-4, atol=1e-5)


def test_rows_of_one_trajectory_in_several_folds_would_be_a_leak():
    groups = torch.arange(60) // 2
    twins = torch.randn(30, 40).repeat_interleave(2, 0)  # the rows of a trajectory are the same, and say nothing
    answers = torch.randn(30, 40).repeat_interleave(2, 0)
    apart, mixed = (
        chosen(nn.Linear(40, 1), twins, answers, groups=one, folds=60, output_is="values")["r2"][0]
        for one in (groups, None)
    )
    assert mixed > 0.9
    assert apart < 0.2


def test_a_residual_network_is_read_no_worse_than_by_the_logit_lens():
    model, td = Residual(), inputs(200)
    plain = measured(LogitLens(STREAM, "norm"), model, td)
    tuned = measured(TunedLens(STREAM, "norm", folds=2, steps=60, rows=256), model, td)
    torch.testing.assert_close(tuned["kl_untuned"], plain["kl"], rtol=1e-5, atol=1e-9)
    assert (tuned["kl"] <= plain["kl"] + 1e-6).all()
    assert tuned["kl"][0] < plain["kl"][0] / 2
    assert tuned["reason"].tolist() == [0] * 4


def test_a_transformer_is_read_at_every_position():
    model = Language().eval()
    td = TensorDict(input=torch.randint(0, 11, (40, 5)), batch_size=[40])
    out = measured(TunedLens(("embed", "encoder.layers.2"), "norm", folds=2, steps=20), model, td)
    assert out["lens"].shape == (2, 40, 5, 11)
    assert out["kl"][0] < out["kl_untuned"][0]
    assert out["kl"][1] < 1e-5


def test_the_units_of_an_image_are_its_channels():
    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.turn = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1)
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

        def forward(self, x):
            return self.head(self.turn(self.conv(x)))

    td = TensorDict(input=torch.randn(60, 2, 3, 3), batch_size=[60])
    out = measured(TunedLens("conv", "head", folds=2, penalty=1e-6), Image(), td)
    assert out["kl"][0] < out["kl_untuned"][0] / 20  # the convolution between them is affine in the channels


# ------------------------------------------------------------------------------------------------- bad data


def test_one_trajectory_alone_has_a_reason():
    out = chosen(nn.Linear(6, 4), *planted(rows=20), groups=torch.zeros(20, dtype=torch.int64))
    assert out["reason"].tolist() == [6, 6]
    assert out["kl"].isnan().all()
    assert out["lens"].isnan().all()
    assert out["converged"].tolist() == [0, 0]


def test_constant_and_rank_deficient_layers_are_read():
    _, last = planted(rows=60)
    flat = last[:, :1] * torch.ones(6)
    out = chosen(nn.Linear(6, 2), torch.ones(60, 6), flat, last, output_is="values")
    assert out["reason"].tolist() == [0, 0, 0]
    assert out["r2"][0] < 0.01  # no more than the mean of the others
    assert 0 < out["r2"][1] < 0.9
    logits = chosen(nn.Linear(6, 3), torch.ones(60, 6), flat, last)
    assert logits["kl"].isfinite().all()
    assert logits["kl"][0] < logits["kl_untuned"][0]


def test_what_is_not_finite_or_constant_has_a_reason():
    layer, last = planted(rows=20)
    layer[3, 2] = torch.inf
    out = chosen(nn.Linear(6, 4), layer, layer[:, :5], last)
    assert out["reason"].tolist() == [2, 1, 0]
    assert out["kl"][:2].isnan().all()
    still = chosen(nn.Linear(6, 1), last, torch.ones(20, 6), output_is="values")
    assert still["reason"].tolist() == [4, 4]
    assert still["r2"].isnan().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("head", ["norm", "head"])
def test_in_every_mode_and_nothing_is_left_behind(mode, head):
    model, td = Residual(), inputs(30)
    model.head.weight.requires_grad_(False)
    state = torch.get_rng_state()
    expected = measured(TunedLens("embed", head, folds=2, steps=5), model, td)["kl"]
    with mode():
        found = measured(TunedLens("embed", head, folds=2, steps=5), model, td)
    assert torch.equal(found["kl"], expected)
    assert not found["lens"].is_inference()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.head.weight.requires_grad
    assert model.head.bias.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_live(tmp_path):
    model, td = Residual(), inputs(40)
    methods = {"lens": TunedLens(STREAM, "head", folds=2, steps=20)}
    with Observer(methods, when=At(0), on=ProbeSet(td, groups=torch.arange(40) // 4), into=tmp_path) as observer:
        observer.step(model, step=0)
    row = ArtifactBuffer.open(tmp_path)["lens"].last()[0]
    assert (row["kl"] < row["kl_untuned"])[:-1].all()
    by_hand = measured(methods["lens"], model, td, groups=torch.arange(40) // 4)
    torch.testing.assert_close(row["lens"], by_hand["lens"])
