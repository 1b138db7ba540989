"""Values over steps, steps first: the axis they lie on, their scatter, which ticks each series has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from tdhook_train.errors import SettingsError

__all__ = ["Array", "array", "by_ticks", "from_log_step", "log_step", "rising_steps", "running_median", "scatter"]

Array = NDArray[np.float64]

_NORMAL = 1.4826  # the standard deviation of a normal over its median absolute deviation


def array(values: Any) -> Array:
    """Return values as float64, of a tensor on any device or of anything numpy takes."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def rising_steps(steps: Any, ticks: int) -> Array:
    """Return the steps as float64.

    Raises:
        SettingsError: they are not as many as the values, not finite, negative, unsorted, or one stands twice.
    """
    found = array(steps)
    if found.shape != (ticks,):
        raise SettingsError(f"steps have shape {found.shape}, expected one for each of {ticks} values")
    if ticks and (not np.isfinite(found).all() or found[0] < 0):
        raise SettingsError("steps must be finite and 0 or more")
    if (wrong := np.flatnonzero(np.diff(found) <= 0)).size:
        at = int(wrong[0])
        raise SettingsError(
            f"steps must rise, but step {found[at + 1]:g} follows step {found[at]:g}; sort them, one value a step"
        )
    return found


def log_step(steps: Array) -> Array:
    """Return ``log(1 + step)``: step 0 lies at 0, and from ten steps on the 1 is less than .05 decades."""
    return np.log1p(steps)


def from_log_step(x: Array) -> Array:
    """Return the steps again, 0 for what lies before them."""
    with np.errstate(over="ignore"):
        return np.maximum(np.expm1(x), 0.0)


def scatter(values: Array) -> Array:
    """Estimate the standard deviation between ticks of series ``[tick, series]``, whatever their course.

    The lesser of two: from first differences, which a single jump does not touch, and from the distance of each value
    to the middle of its neighbours (Gasser et al. 1986), which a slope does not touch.
    """
    first = np.median(np.abs(np.diff(values, axis=0)), 0) / np.sqrt(2)
    second = np.median(np.abs(values[1:-1] - (values[:-2] + values[2:]) / 2), 0) / np.sqrt(1.5)
    return _NORMAL * np.minimum(first, second)


def running_median(values: Array, half_width: int) -> Array:
    """Take the median of each value and as many on either side, fewer near the ends.

    Monotone series stay as they are.
    """
    out = values.copy()
    n = len(values)
    for reach in range(1, min(half_width, (n - 1) // 2) + 1):
        if reach < half_width:
            for at in (reach, n - 1 - reach):
                out[at] = np.median(values[at - reach : at + reach + 1], 0)
        else:
            out[reach : n - reach] = np.median(sliding_window_view(values, 2 * reach + 1, axis=0), -1)
    return out


def by_ticks(values: Array) -> Iterator[tuple[NDArray[np.intp], NDArray[np.bool_]]]:
    """Sort series ``[tick, series]`` by which of their ticks are finite: the places of each sort, and its ticks."""
    finite = np.isfinite(values)
    if finite.all():
        yield np.arange(values.shape[1]), np.ones(len(values), dtype=bool)
        return
    patterns, sort = np.unique(finite, axis=1, return_inverse=True)
    sort = sort.reshape(-1)
    for each in range(patterns.shape[1]):
        yield np.flatnonzero(sort == each), patterns[:, each]
