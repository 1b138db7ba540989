"""Projections, velocities and accelerations: polynomials exactly, numpy's gradient, a run's own series."""

import numpy as np
import pytest
import torch
from method_cases import above_zero, batch, mlp
from tensordict import TensorDict
from torch.testing import assert_close

from tdhook_train import ArtifactBuffer, At, Observer, ProbeSet
from tdhook_train.errors import SettingsError
from tdhook_train.latent import ActivationCache, MeanDifferenceDirection, acceleration, projection, velocity

STEPS = [0, 1, 2, 4, 8, 16, 32, 50, 1000]  # as checkpoints are kept


def grid(n=9, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)).double().add(0.05).cumsum(0)


def parabolas(x):
    """[..., step], and their derivatives."""
    a, b, c = torch.randn(3, 4, 2, 1).double()
    return a * x**2 + b * x + c, 2 * a * x + b, (2 * a).expand(-1, -1, len(x))


@pytest.mark.parametrize("steps", [STEPS, grid().tolist(), [3, 4, 9], [-2.5, 0.0, 0.1, 7.0]])
def test_parabolas_are_differentiated_exactly_at_any_step_sizes_ends_included(steps):
    x = torch.tensor(steps).double()
    value, first, second = parabolas(x)
    assert_close(velocity(value, steps, dim=-1), first, atol=1e-8, rtol=1e-9)
    assert_close(acceleration(value, steps, dim=2), second, atol=1e-8, rtol=1e-7)
    assert_close(velocity(value.movedim(-1, 0), x), first.movedim(-1, 0), atol=1e-8, rtol=1e-9)
    assert_close(acceleration(value.movedim(-1, 1), x, dim=1), second.movedim(-1, 1), atol=1e-8, rtol=1e-7)


def test_velocity_is_numpys_gradient_over_coordinates():
    x, y = grid(12), torch.randn(12, 3).double()
    assert_close(velocity(y, x), torch.as_tensor(np.gradient(y.numpy(), x.numpy(), axis=0, edge_order=2)))
    assert_close(velocity([1, 5], [0, 2]), torch.tensor([2.0, 2.0]).double())  # whole numbers, and two alone
    assert_close(velocity(torch.arange(6).float() ** 2, range(6)), 2 * torch.arange(6).double())


def test_errors_fall_with_the_square_of_the_step_size():
    off = []
    for n in (50, 100):
        x = torch.linspace(0, 3, n).double()
        off.append(
            ((velocity(x.sin(), x) - x.cos()).abs().max(), (acceleration(x.sin(), x) + x.sin())[1:-1].abs().max())
        )
    assert 3.5 < off[0][0] / off[1][0] < 4.5
    assert 3.5 < off[0][1] / off[1][1] < 4.5


def test_a_missing_value_is_missing_beside_it_only():
    y = torch.arange(8).double()
    y[4] = torch.nan
    assert velocity(y, range(8)).isnan().nonzero()[:, 0].tolist() == [3, 4, 5]
    assert acceleration(y, range(8)).isnan().nonzero()[:, 0].tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("measure", "values", "steps", "says"),
    [
        (velocity, [1.0], [0], "velocity needs 2 steps or more, got 1"),
        (acceleration, [1.0, 2.0], [0, 1], "acceleration needs 3 steps or more, got 2"),
        (velocity, [1.0, 2.0, 3.0], [0, 1, 1], r"needs steps that rise, each once and finite, got \[0.0, 1.0, 1.0\]"),
        (acceleration, [1.0, 2.0, 3.0], [0, 2, 1], "needs steps that rise"),
        (velocity, [1.0, 2.0, 3.0], [0, 1, float("nan")], "needs steps that rise"),
        (velocity, [1.0, 2.0, 3.0], [0, 1], r"needs a step for each value, got \(2,\) for \(3,\)"),
    ],
)
def test_steps_that_are_none_are_refused(measure, values, steps, says):
    with pytest.raises(SettingsError, match=says):
        measure(values, steps)


def test_a_projection_is_the_length_along_the_direction():
    h, u = torch.randn(5, 7, 4), torch.randn(4)
    along = projection(h, 3 * u)
    rest = h.double() - along[..., None] * u.double() / u.double().norm()
    assert_close(rest @ u.double(), torch.zeros(5, 7).double())  # what is left is at right angles
    assert_close(rest.square().sum(-1) + along**2, h.double().square().sum(-1))
    each = projection(h, torch.eye(4)[:, None, None, :])  # a direction for each of several, by broadcasting
    assert_close(each.movedim(0, -1), h.double())
    assert projection(h, torch.full((4,), torch.nan)).isnan().all()


def test_a_projection_that_does_not_fit_is_refused():
    with pytest.raises(SettingsError, match=r"the direction has \(3,\), the values \(2, 4\)"):
        projection(torch.zeros(2, 4), torch.ones(3))
    with pytest.raises(SettingsError, match="needs a direction with a length; that is 0"):
        projection(torch.zeros(2, 4), torch.zeros(4))
    values = TensorDict({"net.0": torch.zeros(2, 4)}, [])
    with pytest.raises(SettingsError, match=r"needs a direction for 'net.0'; did you mean 'net.1'\?"):
        projection(values, TensorDict({"net.1": torch.ones(4)}, []))


def test_on_the_artifacts_of_a_run(tmp_path):
    model, td = mlp(3, 5, 2), batch()
    methods = {"cache": ActivationCache(("0", "2")), "side": MeanDifferenceDirection(("0", "2"), above_zero)}
    steps = [0, 1, 5]
    with Observer(methods, when=At(*steps), into=tmp_path, on=ProbeSet(td, groups="rows")) as observer:
        for step in range(6):
            observer.step(model, step=step)
            model[0].bias.data += 0.1 * (2 * step + 1)  # 0.1 · step² so far
    run = ArtifactBuffer.open(tmp_path)
    first, cached = run["side"].at(0)["direction"], run["cache"].at(5)["activation"]
    found = projection(cached, first)
    assert_close(found["2"], cached["2"].double() @ first["2"])
    moved = projection(run["cache"].series(("activation", "0")), first["0"]).mean(1)  # [step]
    slope = 0.1 * first["0"].sum()
    at = run["cache"].steps
    assert_close(velocity(moved, at), 2 * slope * at, atol=1e-5, rtol=1e-4)
    assert_close(acceleration(moved, at), (2 * slope).expand(3), atol=1e-5, rtol=1e-4)
