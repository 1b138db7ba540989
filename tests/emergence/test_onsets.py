"""Onsets lie where they were planted, and nothing has one that did not learn."""

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit

from tdhook_train.emergence import half_maximum, sigmoid_onset
from tdhook_train.errors import SettingsError
from tdhook_train.ops import sigmoid as fits
from tdhook_train.ops.series import running_median

LINEAR = np.linspace(0, 6000, 60)
GEOMETRIC = np.unique(np.concatenate([[0], np.geomspace(1, 1e4, 59).round()]))
MANY = np.linspace(0, 50_000, 500)
STEPS = {"linear": LINEAR, "geometric": GEOMETRIC, "many": MANY}
BOTH = pytest.mark.parametrize("onset", [half_maximum, sigmoid_onset])


def planted(rng, steps, seeds=200):
    return 10 ** (np.log10(steps[-1]) - rng.uniform(0.7, 1.5, seeds))


@BOTH
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("width", [0.03, 0.15])  # decades
@pytest.mark.parametrize("noise", [0.02, 0.1])  # of the rise
def test_planted_onsets_are_found_to_a_twentieth_of_a_decade(onset, steps, width, noise, rng, sigmoids):
    steps = STEPS[steps]
    true = planted(rng, steps)
    found = onset(steps, sigmoids(rng, steps, true, width, noise))
    error = np.log10(found.onset) - np.log10(true)
    assert np.isfinite(error).all()
    assert np.median(np.abs(error)) < 0.05
    assert np.abs(np.median(error)) < 0.04


def test_the_greatest_second_difference_would_not_find_them(rng, sigmoids):
    """The trap: what the error would be, so that the test above says something."""
    true = planted(rng, GEOMETRIC)
    values = sigmoids(rng, GEOMETRIC, true, 0.15, 0.1)
    error = np.log10(GEOMETRIC[1 + np.diff(values, 2, axis=0).argmax(0)]) - np.log10(true)
    assert np.median(np.abs(error)) > 0.3


def test_half_of_the_way_is_where_a_straight_line_in_log_step_has_it():
    steps = np.expm1(np.linspace(0, 9, 31))
    values = 3 + 2 * np.linspace(0, 9, 31).clip(2, 4)  # half-way at 3 of 9
    found = half_maximum(steps, values)
    assert found.onset == pytest.approx(np.expm1(3), rel=1e-12)
    assert (found.start, found.plateau, found.reason) == (7, 11, "")


def test_step_0_lies_at_0_of_the_axis():
    found = half_maximum([0, 99, 200, 300, 400], [0.0, 1, 1, 1, 1])
    assert found.onset == pytest.approx(np.sqrt(100) - 1)


def test_what_is_forgotten_later_was_learned():
    values = np.r_[np.zeros(10), np.ones(20), np.zeros(10)]
    assert 9 < half_maximum(np.arange(40), values).onset < 10


def test_a_dip_after_the_onset_does_not_move_it():
    values = np.r_[np.zeros(10), np.ones(8), np.zeros(8), np.ones(20)]
    assert 9 < half_maximum(np.arange(46), values).onset < 10


def test_single_ticks_that_stand_out_are_no_onset(rng, sigmoids):
    values = sigmoids(rng, GEOMETRIC, np.array([300.0]), 0.05, 0.02)[:, 0]
    clean = half_maximum(GEOMETRIC, values)
    values[5] = 4.0
    values[-3] = 9.0
    values[0] = 0.0
    found = half_maximum(GEOMETRIC, values)
    assert found.onset == pytest.approx(clean.onset, rel=0.05)
    assert found.plateau == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("half_width", [1, 3, 12])
def test_the_running_median_is_that_of_ever_fewer_near_the_ends(half_width, rng):
    values = rng.standard_normal((20, 3))
    reach = [min(half_width, at, 19 - at) for at in range(20)]
    slow = np.stack([np.median(values[at - r : at + r + 1], 0) for at, r in enumerate(reach)])
    assert running_median(values, half_width).tolist() == slow.tolist()
    rising = np.sort(values, 0)
    assert running_median(rising, half_width).tolist() == rising.tolist()


def test_the_level_to_start_from_may_be_given():
    steps, values = np.arange(1, 41), np.r_[np.full(5, 0.2), np.linspace(0.2, 1, 15), np.ones(20)]
    assert np.interp(half_maximum(steps, values).onset, steps, values) == pytest.approx(0.6, abs=5e-3)
    assert np.interp(half_maximum(steps, values, from_=0.4).onset, steps, values) == pytest.approx(0.7, abs=5e-3)
    assert half_maximum(steps, values, from_=-1.0).reason == "beyond half-way from the first step on"


@BOTH
def test_a_measure_that_falls(onset, rng, sigmoids):
    values = sigmoids(rng, GEOMETRIC, np.array([50.0, 500.0]), 0.1, 0.02)
    risen, fallen = onset(GEOMETRIC, values), onset(GEOMETRIC, 2 - values, direction="fall")
    assert fallen.onset == pytest.approx(risen.onset, rel=1e-6)
    assert fallen.plateau == pytest.approx(2 - risen.plateau)
    assert np.isnan(onset(GEOMETRIC, 2 - values).onset).all()
    assert np.isnan(onset(GEOMETRIC, values, direction="fall").onset).all()
    assert onset(np.arange(9), np.arange(9), direction="fall").reason == "does not fall"


@BOTH
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "no finite value"),
        ([1.0], "fewer than 4 ticks: no rise can be told from noise"),
        ([0.0, 1.0], "fewer than 4 ticks: no rise can be told from noise"),
        ([np.nan] * 9, "no finite value"),
        ([2.0] * 9, "constant"),
        (np.linspace(1, 0, 9), "does not rise"),
        ([0.1, 0.3, 0.0, 0.2, 0.35, 0.1, 0.3, 0.2, 0.1], "rises by less than 3 times its scatter between ticks"),
    ],
)
def test_why_there_is_no_onset(onset, values, reason):
    found = onset(np.arange(len(values)) * 10, values)
    assert np.isnan(found.onset)
    assert found.reason == reason


@BOTH
def test_few_of_noise_rise(onset, rng):
    rates = {n: np.mean(half_maximum(np.arange(n), rng.standard_normal((n, 1000))).reason == "") for n in (6, 20, 60)}
    assert rates[6] < 0.12
    assert rates[20] < 0.05
    assert rates[60] < 0.015


@BOTH
def test_ticks_without_a_value_are_left_out_of_their_own_series(onset, rng, sigmoids):
    values = sigmoids(rng, GEOMETRIC, np.array([30.0, 300.0, 300.0]), 0.1, 0.03)
    values[[3, 20, 40], 1] = np.nan
    values[7:12, 2] = np.inf
    together = onset(GEOMETRIC, values)
    for each in range(3):
        there = np.isfinite(values[:, each])
        alone = onset(GEOMETRIC[there], values[there, each])
        assert together.onset[each] == pytest.approx(alone.onset, rel=1e-9)


@BOTH
def test_answers_have_the_shape_of_the_values_and_take_tensors(onset, rng, sigmoids):
    values = sigmoids(rng, GEOMETRIC, planted(rng, GEOMETRIC, 6), 0.1, 0.03).reshape(-1, 2, 3)
    found = onset(torch.tensor(GEOMETRIC), torch.tensor(values, requires_grad=True))
    assert found.onset.shape == found.reason.shape == (2, 3)
    assert found.onset[1, 2] == pytest.approx(onset(GEOMETRIC, values[:, 1, 2]).onset)


@BOTH
@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ([0, 20, 10, 30], "steps must rise, but step 10 follows step 20"),
        ([0, 10, 10, 30], "steps must rise, but step 10 follows step 10"),
        ([0, 10, 20], "one for each of 4 values"),
        ([-1, 0, 1, 2], "0 or more"),
        ([0, 1, 2, np.nan], "finite"),
    ],
)
def test_steps_must_rise(onset, steps, error):
    with pytest.raises(SettingsError, match=error):
        onset(steps, [0.0, 0, 1, 1])


def test_other_mistakes_are_named():
    with pytest.raises(SettingsError, match="did you mean 'rise' or 'fall'"):
        half_maximum([0, 1], [0, 1], direction="up")
    with pytest.raises(SettingsError, match="one a step"):
        half_maximum([0], 3.0)
    with pytest.raises(SettingsError, match="level=95"):
        sigmoid_onset([0, 1], [0, 1], level=95)


# --- the sigmoid alone -------------------------------------------------------------------------------------------


def curve(x, start, rise, middle, width):
    return start + rise / (1 + np.exp(-(x - middle) / width))


def test_the_fit_and_its_errors_are_those_of_scipy(rng):
    x = np.linspace(0, 10, 40)
    for _ in range(20):
        values = curve(x, 0.2, 0.7, rng.uniform(2, 8), 0.4) + 0.05 * rng.standard_normal(40)
        found = fits.fit_sigmoids(x, values[:, None])
        own = [part[0] for part in (found.low, found.rise, found.middle, found.width)]
        theirs, covariance = curve_fit(curve, x, values, p0=[0, 1, x[np.abs(values - 0.5).argmin()], 0.5])
        assert (np.abs(own - theirs) < 0.01 * np.sqrt(np.diag(covariance))).all()
        e = values - curve(x, *theirs)
        rho = (e[1:] * e[:-1]).sum() / (e @ e)
        rho = min(max(rho + (1 + 4 * rho) / 40, 0), 0.95)
        assert found.error[0] == pytest.approx(np.sqrt(covariance[2, 2] * (1 + rho) / (1 - rho)), rel=1e-3)


@pytest.mark.parametrize(("rho", "least"), [(0.0, 0.92), (0.7, 0.80)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(rho, least, rng, autoregressive):
    x = np.linspace(0, 9, 60)
    middle = rng.uniform(3, 6, 400)
    values = curve(x[:, None], 0.1, 0.8, middle, 0.4) + 0.08 * autoregressive(rng, 60, 400, rho)
    found = sigmoid_onset(np.expm1(x), values)
    held = np.mean((found.low <= np.expm1(middle)) & (np.expm1(middle) <= found.high))
    assert least < held < 0.98


def test_a_rise_between_two_ticks_has_both_in_its_interval():
    steps = np.r_[np.arange(10), 1000 + np.arange(10)]
    found = sigmoid_onset(steps, (steps > 500).astype(float))
    assert found.low == pytest.approx(8)
    assert found.high == pytest.approx(1001)
    assert 9 < found.onset < 1000


def test_a_rise_that_has_only_begun_has_no_sigmoid():
    x = np.linspace(0, 9, 60)
    found = sigmoid_onset(np.expm1(x), np.exp(x))
    assert found.reason == "the sigmoid's middle lies outside the measured steps"
    assert np.isnan([found.onset, found.low, found.high, found.plateau]).all()


def test_a_fit_that_does_not_converge_says_so(monkeypatch, rng, sigmoids):
    monkeypatch.setattr(fits, "_STEPS", 1)
    found = sigmoid_onset(GEOMETRIC, sigmoids(rng, GEOMETRIC, np.array([300.0]), 0.1, 0.05)[:, 0])
    assert found.reason == "the fit of a sigmoid did not converge"


def test_five_ticks_are_too_few_for_a_sigmoid():
    found = sigmoid_onset(np.arange(5), [0.0, 0, 0.5, 1, 1])
    assert found.reason.startswith("fewer than 6 ticks")
