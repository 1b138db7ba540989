"""Onsets of several seeds: where they lie, and whether one thing is learned before another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from tdhook_train.errors import SettingsError
from tdhook_train.ops.series import Array, array, from_log_step, log_step

__all__ = ["Center", "Earlier", "across_seeds", "earlier"]


@dataclass(frozen=True)
class Center:
    """Where the onsets of several seeds lie.

    Args:
        onset: their mean or median, in steps; infinite where the median seed never learned.
        low: the least step of the interval; NaN where so few seeds have none at that level.
        high: the greatest; infinite where it reaches seeds that never learned.
        learned: how many seeds have an onset.
        seeds: of how many.
        reason: why something is missing.
    """

    onset: float
    low: float
    high: float
    learned: int
    seeds: int
    reason: str


@dataclass(frozen=True)
class Earlier:
    """Whether one onset comes before another, seed by seed.

    Args:
        p: of the one-sided test; NaN without a seed that tells.
        decades: by how much, median of the seeds (positive: A first); infinite where only A is ever learned.
        seeds: how many seeds tell.
        least_p: the least p that so many seeds can give.
        reason: what is wrong with the test.
    """

    p: float
    decades: float
    seeds: int
    least_p: float
    reason: str


def across_seeds(onsets: Any, *, of: Literal["mean", "median"] = "mean", level: float = 0.95) -> Center:
    """Return the mean or median of one onset over seeds, in ``log(1 + step)``, with an interval.

    ``"mean"`` is of the seeds that learned, with Student's t: an interval from two seeds on, a useful one from four or
    five. ``"median"`` counts seeds that never learned as later than all, and its interval lies between two of the
    onsets (exact, from the binomial distribution): at 95 % it takes six seeds.

    Args:
        onsets: a step a seed, NaN for a seed that has none.
        of: what to take.
        level: of the interval.

    Raises:
        SettingsError: there is no seed, or a setting is out of its range.
    """
    steps = _seeds(onsets)
    if of not in ("mean", "median") or not 0 < level < 1:
        raise SettingsError(f"of={of!r} must be 'mean' or 'median', and level={level} between 0 and 1")
    learned = int(np.isfinite(steps).sum())
    found = _mean(steps[np.isfinite(steps)], level) if of == "mean" else _median(np.sort(steps), level)
    missing = "" if learned == len(steps) else f"{len(steps) - learned} of {len(steps)} seeds have no onset"
    return Center(*found[:3], learned, len(steps), "; ".join(filter(None, [missing, found[3]])))


def _seeds(onsets: Any) -> Array:
    steps = np.atleast_1d(array(onsets))
    if steps.ndim != 1 or not steps.size:
        raise SettingsError(f"onsets of shape {steps.shape} must be one step a seed")
    return np.where(np.isnan(steps), np.inf, steps)


def _mean(steps: Array, level: float) -> tuple[float, float, float, str]:
    if not steps.size:
        return np.nan, np.nan, np.nan, ""
    x = log_step(steps)
    middle = x.mean()
    if len(x) < 2:
        return float(from_log_step(middle)), np.nan, np.nan, "one seed has no interval"
    reach = stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    ends = from_log_step(np.array([middle, middle - reach, middle + reach]))
    return float(ends[0]), float(ends[1]), float(ends[2]), ""


def _median(steps: Array, level: float) -> tuple[float, float, float, str]:
    n = len(steps)
    middle = float(from_log_step(log_step(steps[[(n - 1) // 2, n // 2]]).mean()))
    left_out = int(stats.binom.ppf((1 - level) / 2, n, 0.5))  # the least k with P(X <= k) at or above the tail
    if left_out == 0:
        fewest = int(np.ceil(1 - np.log2(1 - level)))
        return middle, np.nan, np.nan, f"{n} seeds have no interval at {level:.0%}: it takes {fewest}"
    return middle, float(steps[left_out - 1]), float(steps[n - left_out]), ""


def earlier(a: Any, b: Any) -> Earlier:
    """Test whether A is learned before B: signed ranks of the differences in log-step, seed by seed, one-sided.

    The distribution is that of all ways to swap A and B within seeds. A seed that learns only one of the two counts
    with the greatest difference; one that learns neither, or both at once, tells nothing. With n seeds p is at least
    2⁻ⁿ: it takes five for p < .05, and all five must agree.

    Args:
        a: the onsets of A, a step a seed, NaN where there is none.
        b: those of B, of the same seeds in the same order.

    Raises:
        SettingsError: not the same number of seeds.

    Source: Wilcoxon 1945.
    """
    first, second = _seeds(a), _seeds(b)
    if first.shape != second.shape:
        raise SettingsError(
            f"A has {len(first)} seeds and B {len(second)}; give both of the same seeds, NaN where none"
        )
    either = np.isfinite(first) | np.isfinite(second)
    gaps = log_step(second[either]) - log_step(first[either])
    gaps = gaps[gaps != 0]
    n = len(gaps)
    if n == 0:
        return Earlier(np.nan, np.nan, 0, 1.0, "no seed tells: none learned, or both at once")
    ranks = np.sign(gaps) * stats.rankdata(np.abs(gaps))
    few = f"{n} seeds cannot give p < .05: it takes 5" if n < 5 else ""
    ordered = np.sort(gaps)
    low, high = ordered[(n - 1) // 2], ordered[n // 2]
    with np.errstate(invalid="ignore"):  # half of the seeds learn only A, half only B: no median
        decades = low if low == high else (low + high) / 2
    return Earlier(_p(ranks), float(decades / np.log(10)), n, 0.5**n, few)


def _p(ranks: Array) -> float:
    """Return how often the positive ranks sum to so much, over all signs: counted rank by rank, in halves for ties."""
    steps = np.abs(2 * ranks).round().astype(np.intp)
    chances = np.ones(1)
    for step in steps:
        without = np.pad(chances, (0, step))
        chances = (without + np.roll(without, step)) / 2
    return float(chances[steps[ranks > 0].sum() :].sum())
