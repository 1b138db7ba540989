"""Onsets of several seeds, against scipy and against going through every case."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from tdhook_train.emergence import across_seeds, earlier
from tdhook_train.errors import SettingsError

ONSETS = [120.0, 300.0, 90.0, 210.0, 180.0, 450.0, 160.0]


def test_the_mean_and_its_interval_are_those_of_students_test():
    found = across_seeds(ONSETS)
    theirs = stats.ttest_1samp(np.log1p(ONSETS), 0).confidence_interval(0.95)
    assert found.onset == pytest.approx(np.expm1(np.log1p(ONSETS).mean()))
    assert (found.low, found.high) == pytest.approx((np.expm1(theirs.low), np.expm1(theirs.high)))
    assert (found.learned, found.seeds, found.reason) == (7, 7, "")


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("seeds", [6, 7, 12])
def test_the_medians_interval_is_that_of_the_quantile_test(level, seeds, rng):
    onsets = rng.uniform(10, 1000, seeds)
    found = across_seeds(onsets, of="median", level=level)
    theirs = stats.quantile_test(onsets, p=0.5).confidence_interval(level)
    assert (found.low, found.high) == (theirs.low, theirs.high)
    assert found.onset == pytest.approx(np.expm1(np.median(np.log1p(onsets))))


def test_few_seeds_are_told():
    assert across_seeds(ONSETS[:5], of="median").reason == "5 seeds have no interval at 95%: it takes 6"
    assert np.isnan(across_seeds(ONSETS[:5], of="median").low)
    assert np.isfinite(across_seeds(ONSETS[:6], of="median").low)
    one = across_seeds(100)
    assert (round(one.onset), one.reason) == (100, "one seed has no interval")
    assert np.isfinite(across_seeds(ONSETS[:2]).low)


def test_seeds_that_never_learned_are_later_than_all():
    found = across_seeds([*ONSETS, np.nan, np.nan], of="median")
    assert found.onset == pytest.approx(210)
    assert found.high == np.inf or found.high == 450
    assert found.reason == "2 of 9 seeds have no onset"
    assert (found.learned, found.seeds) == (7, 9)
    assert across_seeds([*ONSETS, np.nan, np.nan]).onset == pytest.approx(across_seeds(ONSETS).onset)
    assert across_seeds([5.0, np.nan, np.nan], of="median").onset == np.inf
    never = across_seeds([np.nan, np.nan])
    assert np.isnan(never.onset)
    assert never.reason == "2 of 2 seeds have no onset"


def test_p_is_wilcoxons(rng):
    for n in (5, 8, 12):
        a, b = rng.uniform(10, 1000, (2, n))
        theirs = stats.wilcoxon(np.log1p(b) - np.log1p(a), alternative="greater", method="exact")
        assert earlier(a, b).p == pytest.approx(theirs.pvalue)
        assert earlier(a, b).decades == pytest.approx(np.median(np.log1p(b) - np.log1p(a)) / np.log(10))


def test_p_with_ties_is_that_of_all_swaps():
    a, b = np.array([10.0, 20, 30, 40, 50, 70]), np.array([10.0, 41, 61, 19.5, np.nan, np.nan])
    gaps = np.log1p(np.where(np.isnan(b), np.inf, b)) - np.log1p(a)
    gaps = gaps[gaps != 0]
    ranks = stats.rankdata(np.abs(gaps))
    observed = (ranks * np.sign(gaps)).sum()
    every = [(ranks * signs).sum() >= observed for signs in product((-1, 1), repeat=len(gaps))]
    found = earlier(a, b)
    assert found.p == pytest.approx(np.mean(every))
    assert (found.seeds, found.least_p) == (5, 1 / 32)


def test_five_seeds_that_agree_are_just_enough():
    a = np.array([10.0, 20, 30, 40, 50])
    assert earlier(a, 3 * a).p == 1 / 32
    assert earlier(a, 3 * a).reason == ""
    assert earlier(3 * a, a).p == 1
    assert earlier(a[:4], 3 * a[:4]).p == 1 / 16
    assert earlier(a[:4], 3 * a[:4]).reason == "4 seeds cannot give p < .05: it takes 5"


def test_many_seeds(rng):
    a = rng.uniform(10, 1000, 30)
    b = a * np.exp(0.3 + 0.5 * rng.standard_normal(30))
    theirs = stats.wilcoxon(np.log1p(b) - np.log1p(a), alternative="greater", method="exact")
    assert earlier(a, b).p == pytest.approx(theirs.pvalue, rel=1e-9)


def test_what_is_learned_in_only_one_of_two_counts():
    learned, never = np.array([10.0, 20, 30, 40, 50]), np.full(5, np.nan)
    assert earlier(learned, never).p == 1 / 32
    assert earlier(learned, never).decades == np.inf
    assert earlier(never, never).reason == "no seed tells: none learned, or both at once"
    assert np.isnan(earlier(learned, learned).p)
    assert np.isnan(earlier([1.0, np.nan], [np.nan, 1.0]).decades)


def test_the_test_keeps_its_level(rng):
    a, b = rng.lognormal(5, 1, (2, 2000, 7))
    rate = np.mean([earlier(*pair).p < 0.05 for pair in zip(a, b, strict=True)])
    assert rate < 0.065


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: earlier([1, 2], [1]), "A has 2 seeds and B 1"),
        (lambda: across_seeds([]), "one step a seed"),
        (lambda: across_seeds([1.0], of="mode"), "must be 'mean' or 'median'"),
        (lambda: across_seeds([1.0], level=2), "level=2 between 0 and 1"),
    ],
)
def test_mistakes_are_named(call, error):
    with pytest.raises(SettingsError, match=error):
        call()
