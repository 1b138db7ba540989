"""Where series get half of the way from their first level to their highest, many at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from tdhook_train.ops.series import Array, from_log_step, log_step, running_median, scatter

__all__ = ["BEYOND", "FEW", "FLAT", "FOUND", "NOT_UP", "WITHIN", "HalfWay", "half_way"]

FOUND, FEW, FLAT, NOT_UP, WITHIN, BEYOND = range(6)
_FEWEST = 4  # ticks
_SIGMAS = 3.0  # what a rise must exceed, in standard deviations between ticks


@dataclass(frozen=True)
class HalfWay:
    """One number a series: the step half-way, the two levels, and why there is no step (a code, 0 where there is)."""

    onset: Array
    start: Array
    plateau: Array
    code: NDArray[np.int64]


def half_way(steps: Array, values: Array, from_: Array | None = None) -> HalfWay:
    """Find the first upward crossing of half of the way in ``log(1 + step)``.

    Args:
        steps: rising, one a tick.
        values: ``[tick, series]``, finite.
        from_: the level to start from, ``[series]``; None takes that of the first ticks.
    """
    n, count = values.shape
    nan = np.full(count, np.nan)
    if n < _FEWEST:
        return HalfWay(nan, nan, nan, np.full(count, FEW))
    spread = _SIGMAS * scatter(values)
    smooth = running_median(values, min(max(n // 40, 1), 12))
    start = _start(values, spread) if from_ is None else from_
    plateau = sliding_window_view(smooth, max(n // 5, min(3, n // 4)), axis=0).mean(-1).max(0)
    half = (start + plateau) / 2
    up = (smooth[:-1] < half) & (smooth[1:] >= half)
    code = np.select(
        [np.ptp(values, axis=0) == 0, plateau <= start, plateau - start <= spread, ~up.any(0)],
        [FLAT, NOT_UP, WITHIN, BEYOND],
        FOUND,
    )
    at, column = up.argmax(0), np.arange(count)
    low, high = smooth[at, column], smooth[at + 1, column]
    x = log_step(steps)
    with np.errstate(invalid="ignore", divide="ignore"):
        crossing = x[at] + (half - low) / (high - low) * (x[at + 1] - x[at])
        onset = np.where(code == FOUND, from_log_step(crossing), np.nan)
    return HalfWay(onset, start, plateau, code)


def _start(values: Array, spread: Array) -> Array:
    """The median of three ticks; the first alone where it stands apart, as if all was learned before the second."""
    middle = np.median(values[:3], 0)
    return np.where(np.abs(values[0] - middle) > spread, values[0], middle)
