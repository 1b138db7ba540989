"""Where the mean of a series changes: exact optimal partitioning, and what a change must gain to count."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from tdhook_train.ops.series import Array

__all__ = ["break_quantile", "long_run_variance", "means_of", "partition"]

Begins = NDArray[np.bool_]

_MOST = 5  # changes told from noise while its variance is estimated
_PLACES = 100  # where changes may lie meanwhile
_TICKS_A_CHANGE = 8
_ENOUGH = 40  # ticks
_PERSISTENT = 0.97  # an autocorrelation beyond which all is noise


def partition(values: Array, penalty: Array, least: int = 2) -> Begins:
    """Cut series ``[tick, series]`` so that squares about the means plus a penalty a cut are at their least.

    Dynamic programming over all cuts (Jackson et al. 2005), O(ticks²), all series side by side.

    Args:
        values: finite.
        penalty: ``[series]``.
        least: ticks in a segment.

    Returns:
        True where a segment begins, the first aside: ``[tick, series]``.
    """
    n, count = values.shape
    last = np.zeros((n + 1, count), dtype=np.intp)
    sums, _ = _sums(values)
    # of the first t ticks, less their squares, which every cut shares
    best = np.full((n + 1, count), np.inf)
    best[0] = -penalty
    for t in range(least, n + 1):
        past = t - least + 1
        gap = sums[t] - sums[:past]
        cost = best[:past] - gap * gap / (t - np.arange(past))[:, None]
        last[t] = cost.argmin(0)
        best[t] = cost.min(0) + penalty
    begins = np.zeros((n, count), dtype=bool)
    at, column = np.full(count, n), np.arange(count)
    while at.any():
        at = last[at, column]
        begins[at, column] |= at > 0
    return begins


def _sums(values: Array) -> tuple[Array, Array]:
    centred = values - values.mean(0)
    zero = np.zeros((1, values.shape[1]))
    return np.concatenate([zero, centred.cumsum(0)]), (centred * centred).sum(0)


def means_of(values: Array, begins: Begins) -> Array:
    """Return the mean of the segment that each value lies in: ``[tick, series]``."""
    n, count = values.shape
    segment = begins.cumsum(0) + np.arange(count) * n
    sizes = np.bincount(segment.reshape(-1), minlength=n * count)
    totals = np.bincount(segment.reshape(-1), values.reshape(-1), minlength=n * count)
    return (totals / np.maximum(sizes, 1))[segment]


def long_run_variance(values: Array) -> Array:
    """Estimate the long-run variance of the noise about a mean that may change: ``[series]``.

    That is what n times the variance of a mean of n ticks tends to. For k = 0, 1, … it is taken from the residuals of
    the best k + 2 changes (k + 1 where ticks are few), until with it no more than k changes pay: residuals of k
    changes alone would hold what a bump leaves, and differences between ticks tell too little of an autocorrelation.
    The residuals are whitened by a first-order autoregression; its coefficient is raised by twice the bias that
    Kendall (1954) found, since the changes were chosen to fit.
    """
    n, count = values.shape
    most = min(_MOST + 2, n // _TICKS_A_CHANGE)
    ahead = min(2 if n >= _ENOUGH else 1, most)
    found, squares = _best_cuts(values, most)
    each = np.stack([_of_residuals(values - means_of(values, begins), k) for k, begins in enumerate(found)])
    variance = np.full(count, np.nan)
    # not below rounding: a series without noise has its changes, and no others
    each = np.maximum(each, 1e-12 * values.var(0) + 1e-300)
    for k in range(ahead, most + 1):
        paid = squares[: k + 1] + 3 * np.log(n) * each[k] * np.arange(k + 1)[:, None]
        settled = np.isnan(variance) & ((paid.argmin(0) <= k - ahead) | (k == most))
        variance[settled] = each[k, settled]
    return variance


def _best_cuts(values: Array, most: int) -> tuple[list[Begins], Array]:
    """The best 0, 1, … ``most`` cuts, at a hundred places at the most, and the squares that each leaves."""
    n, count = values.shape
    ends = np.unique(np.linspace(0, n, min(n, _PLACES) + 1).round().astype(np.intp))
    sums, squares = _sums(values)
    sums = sums[ends]
    long = np.maximum(ends[:, None] - ends, 1).astype(np.float64)
    long[(ends[:, None] - ends) < 2] = np.nan  # a segment has two ticks
    with np.errstate(invalid="ignore", divide="ignore"):
        best = np.where(ends[:, None] >= 2, -(sums**2) / ends[:, None], np.inf)
    column = np.arange(count)
    tables: list[NDArray[np.intp]] = []
    found, left = [np.zeros((n, count), dtype=bool)], [squares + best[-1]]
    for _ in range(most):
        table, better = np.zeros((len(ends), count), dtype=np.intp), np.full_like(best, np.inf)
        for t in range(1, len(ends)):
            gap = sums[t] - sums[:t]
            cost = np.nan_to_num(best[:t] - gap * gap / long[t, :t, None], nan=np.inf, posinf=np.inf)
            table[t] = cost.argmin(0)
            better[t] = cost[table[t], column]
        tables.append(table)
        best = better
        begins, at = np.zeros((n, count), dtype=bool), np.full(count, len(ends) - 1)
        for each in reversed(tables):
            at = each[at, column]
            begins[ends[at], column] = True
        found.append(begins)
        left.append(squares + best[-1])
    return found, np.stack(left)


def _of_residuals(e: Array, cuts: int) -> Array:
    n = len(e)
    squares = (e * e).sum(0)
    with np.errstate(invalid="ignore"):
        rho = np.nan_to_num((e[1:] * e[:-1]).sum(0) / squares)
    rho = np.clip(rho + 2 * (1 + 3 * rho) * (cuts + 1) / n, 0, _PERSISTENT)
    white = e[1:] - rho * e[:-1]
    return (white * white).sum(0) / max(n - 2 - cuts, 1) / (1 - rho) ** 2


def break_quantile(level: float) -> float:
    """Return the half-width of the interval of a change, in units of long-run variance over jump² (Bai 1997).

    It holds the maximiser of a two-sided Brownian motion with drift ``W(s) - |s| / 2`` with that probability.
    """

    def beyond(x: float) -> float:  # of a closed form, Yao 1987
        root = np.sqrt(x)
        inside = 1 + np.sqrt(x / (2 * np.pi)) * np.exp(-x / 8) - (x + 5) / 2 * norm.cdf(-root / 2)
        return float(inside + 1.5 * np.exp(x + norm.logcdf(-1.5 * root)) - (1 + level) / 2)

    return float(brentq(beyond, 1e-9, 700.0))
