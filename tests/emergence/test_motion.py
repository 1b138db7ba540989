"""Derivatives are by the real distances between steps."""

import numpy as np
import pytest

from tdhook_train.emergence import acceleration, velocity
from tdhook_train.errors import SettingsError

STEPS = np.array([0, 1, 2, 4, 8, 100, 1000, 1010, 5000.0])


def test_exact_on_lines_and_parabolas_at_unequal_steps():
    line, parabola = 3 - 2 * STEPS, 1 + 2 * STEPS - 0.3 * STEPS**2
    values = np.stack([line, parabola], 1)
    assert velocity(STEPS, values) == pytest.approx(np.stack([np.full(9, -2), 2 - 0.6 * STEPS], 1), rel=1e-9)
    assert acceleration(STEPS, values) == pytest.approx(np.tile([0, -0.6], (9, 1)), rel=1e-7, abs=1e-9)
    assert velocity(STEPS, values.reshape(9, 2, 1)).shape == (9, 2, 1)


def test_second_order_where_a_cubic_is():
    steps = np.sort(np.random.default_rng(0).uniform(0, 1, 1000))
    assert velocity(steps, steps**3)[1:-1] == pytest.approx(3 * steps[1:-1] ** 2, abs=1e-4)
    assert acceleration(steps, steps**3)[1:-1] == pytest.approx(6 * steps[1:-1], abs=0.05)


def test_ticks_without_a_value_are_spanned():
    values = np.stack([STEPS**2, STEPS**2], 1)
    values[[2, 5], 1] = np.nan
    found = velocity(STEPS, values)
    assert np.isnan(found[:, 1]).nonzero()[0].tolist() == [2, 5]
    assert found[3, 1] == pytest.approx(2 * STEPS[3])
    assert np.isnan(acceleration(STEPS, values)[:, 1]).nonzero()[0].tolist() == [2, 5]


def test_few_ticks():
    assert np.isnan(velocity([3], [1.0])).all()
    assert velocity([0, 4], [1.0, 3.0]).tolist() == [0.5, 0.5]
    assert np.isnan(acceleration([0, 4], [1.0, 3.0])).all()
    assert acceleration([0, 1, 3], [0.0, 1.0, 9.0]).tolist() == [2, 2, 2]
    assert velocity([], []).shape == (0,)


@pytest.mark.parametrize("derivative", [velocity, acceleration])
def test_repeated_steps_are_refused(derivative):
    with pytest.raises(SettingsError, match="step 10 follows step 10"):
        derivative([0, 10, 10], [1, 2, 3])
