"""Changes are the best there are, noise seldom has any, and planted shifts are found."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from scipy.stats import binomtest

from tdhook_train.emergence import change_points
from tdhook_train.errors import SettingsError
from tdhook_train.ops.partition import break_quantile, long_run_variance, partition


def squares(part):
    return ((part - part.mean()) ** 2).sum()


def brute(values, penalty, least):
    """Try every way to cut."""
    n = len(values)
    best = (np.inf, ())
    for count in range(n // least):
        for cuts in combinations(range(1, n), count):
            ends = (0, *cuts, n)
            if min(np.diff(ends)) >= least:
                cost = sum(squares(values[a:b]) for a, b in pairwise(ends)) + penalty * count
                best = min(best, (cost, cuts))
    return best[1]


@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("penalty", [0.1, 1.0, 4.0])
def test_the_changes_are_those_of_all_ways_to_cut(least, penalty, rng):
    for n in (2, 3, 7, 11):
        for _ in range(8):
            values = rng.standard_normal(n) + 100 + 2 * (np.arange(n) >= rng.integers(n))
            found = change_points(values, penalty=penalty, least=least)
            assert tuple(found.points) == brute(values, penalty, least)
            ends = (0, *found.points, n)
            assert found.means == pytest.approx([values[a:b].mean() for a, b in pairwise(ends)])
            assert found.penalty == penalty


def test_series_side_by_side_are_cut_as_alone(rng):
    values = rng.standard_normal((40, 9)) + 3 * (np.arange(40)[:, None] >= rng.integers(5, 35, 9))
    together = partition(values, np.full(9, 6.0))
    alone = [partition(values[:, [each]], np.array([6.0]))[:, 0] for each in range(9)]
    assert (together == np.stack(alone, 1)).all()
    assert together.any(0).all()


def cut(values):
    n = len(values)
    return partition(values, 3 * long_run_variance(values) * np.log(n))


# no more than so many of the noise may have a change: measured over 2,000: 2, 6, 0.3 and 1 %
@pytest.mark.parametrize(("rho", "ticks", "most"), [(0, 60, 0.06), (0.7, 60, 0.09), (0, 200, 0.02), (0.7, 200, 0.03)])
def test_noise_seldom_has_a_change(rho, ticks, most, rng, autoregressive):
    noise = autoregressive(rng, ticks, 1000, rho)
    found = int(cut(noise).any(0).sum())
    assert binomtest(found, 1000).proportion_ci().high < most
    if rho:  # the usual penalty, to show that this could fail
        usual = partition(noise, 2 * noise.var(0) * np.log(ticks)).any(0).mean()
        assert usual > 0.9


# measured: 100, 41, 65, 100, 89, 100 and 98 %
@pytest.mark.parametrize(
    ("rho", "ticks", "shift", "least"),
    [
        (0, 60, 2, 0.98),
        (0.7, 60, 2, 0.3),
        (0.7, 60, 4, 0.55),
        (0, 200, 2, 0.99),
        (0.7, 200, 2, 0.8),
        (0.7, 200, 4, 0.98),
    ],
)
def test_shifts_are_found(rho, ticks, shift, least, rng, autoregressive):
    values = autoregressive(rng, ticks, 400, rho)
    values[ticks // 2 :] += shift
    begins = cut(values)
    assert begins.any(0).mean() > least
    one = begins.sum(0) == 1
    assert np.median(np.abs(begins[:, one].argmax(0) - ticks // 2)) <= 1


@pytest.mark.parametrize("rho", [0, 0.7])
def test_a_bump_and_stairs_are_found(rho, rng, autoregressive):
    """One change alone gains next to nothing of a bump."""
    values = autoregressive(rng, 200, 200, rho)
    values[70:140, :100] += 3
    values[70:, 100:] += 3
    values[140:, 100:] += 3
    counts = cut(values).sum(0)
    assert (counts[:100] == 2).mean() > 0.75
    assert (counts[100:] == 2).mean() > 0.75


def test_the_long_run_variance_is_that_of_the_process(rng, autoregressive):
    for rho, shift in ((0, 0), (0, 5), (0.7, 0), (0.7, 5)):
        values = autoregressive(rng, 1000, 100, rho)
        values[300:] += shift
        assert np.median(long_run_variance(values)) == pytest.approx((1 + rho) / (1 - rho), rel=0.15)


def test_the_interval_holds_the_change(rng, autoregressive):
    assert break_quantile(0.95) == pytest.approx(11.0, abs=0.05)  # Bai 1997, table of critical values
    assert break_quantile(0.90) == pytest.approx(7.7, abs=0.05)
    held = []
    for rho in (0, 0.5):
        values = autoregressive(rng, 120, 60, rho)
        values[60:] += 3
        for series in values.T:
            found = change_points(series)
            if len(found.points) == 1:
                held.append(found.low[0] <= 60 <= found.high[0])
                assert 0 < found.low[0] <= found.points[0] <= found.high[0] < 120
    assert len(held) > 90
    assert np.mean(held) > 0.93


def test_the_interval_is_bais(rng):
    values = rng.standard_normal(200) + 1.5 * (np.arange(200) >= 80)
    found = change_points(values)
    reach = int(11.033 * long_run_variance(values[:, None])[0] / np.diff(found.means)[0] ** 2) + 1
    assert (found.low.tolist(), found.high.tolist()) == ([found.points[0] - reach], [found.points[0] + reach])
    assert found.penalty == pytest.approx(3 * long_run_variance(values[:, None])[0] * np.log(200))


def test_what_does_not_change_has_no_change():
    for values in ([], [1.0], [1.0, 2.0], np.full(30, 0.1), np.zeros(200)):
        found = change_points(values)
        assert found.points.tolist() == found.low.tolist() == found.high.tolist() == []
        assert len(found.means) == (len(values) > 0)


def test_a_shift_without_noise_is_one_change():
    found = change_points(np.r_[np.full(20, 0.3), np.full(17, 0.7)])
    assert found.points.tolist() == [20]
    assert found.means == pytest.approx([0.3, 0.7])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"values": [[1.0, 2.0]]}, "one finite number a tick"),
        ({"values": [1.0, np.nan]}, "one finite number a tick"),
        ({"values": [1.0, 2.0], "least": 0}, "least=0 must be 1 or more"),
        ({"values": [1.0, 2.0], "penalty": -1.0}, "penalty=-1.0 0 or more"),
        ({"values": [1.0, 2.0], "level": 1.0}, "level=1.0 within 0 and 1"),
    ],
)
def test_mistakes_are_named(arguments, error):
    with pytest.raises(SettingsError, match=error):
        change_points(**arguments)
