"""How fast a measure moves, with the real distances between steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from tdhook_train.emergence.kinds import given
from tdhook_train.ops.series import Array, by_ticks

__all__ = ["acceleration", "velocity"]


def velocity(steps: Any, values: Any) -> Array:
    """Return the first derivative by step, exact for polynomials of degree 2, in the shape of ``values``.

    Through three ticks each time, at the ends the last three; of two ticks, the slope between them. NaN where a value
    is not finite or has no neighbour; its neighbours' differences then span the gap.

    Args:
        steps: rising, one a tick, at any distances.
        values: ``[tick]`` or ``[tick, ...]``.

    Raises:
        SettingsError: steps do not rise, or are not as many as values.
    """
    return _each(steps, values, _slope, 2)


def acceleration(steps: Any, values: Any) -> Array:
    """Return the second derivative by step, exact for polynomials of degree 2, in the shape of ``values``.

    Through three ticks each time; the ends have that of their neighbours. NaN with fewer than three finite ticks. Its
    greatest value is no onset: noise moves it by half a decade and more.

    Args:
        steps: rising, one a tick, at any distances.
        values: ``[tick]`` or ``[tick, ...]``.

    Raises:
        SettingsError: steps do not rise, or are not as many as values.
    """
    return _each(steps, values, _bend, 3)


def _each(steps: Any, values: Any, derivative: Any, fewest: int) -> Array:
    steps, flat, shape = given(steps, values)
    out = np.full_like(flat, np.nan)
    for places, ticks in by_ticks(flat):
        if ticks.sum() >= fewest:
            out[np.ix_(ticks, places)] = derivative(steps[ticks], flat[np.ix_(ticks, places)])
    return out.reshape(len(steps), *shape)


def _slope(steps: Array, values: Array) -> Array:
    return np.gradient(values, steps, axis=0, edge_order=2 if len(steps) > 2 else 1)


def _bend(steps: Array, values: Array) -> Array:
    slopes = np.diff(values, axis=0) / np.diff(steps)[:, None]
    inner = 2 * np.diff(slopes, axis=0) / (steps[2:] - steps[:-2])[:, None]  # twice the divided difference
    return np.concatenate([inner[:1], inner, inner[-1:]])
