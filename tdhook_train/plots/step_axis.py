"""The time axis of every picture: optimizer steps.

Measured steps are dense at the start of training and even later on. A scale of log(1 + step) keeps each at its true
place, lets the first steps be told apart and has room for step 0; a linear scale is one click away in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tdhook_train.plots.panels import Array

__all__ = ["SCALES", "Scale", "Ticks", "count", "edges", "plotly_axis", "positions", "ticks"]

Scale: TypeAlias = Literal["log", "linear"]
Ticks: TypeAlias = tuple[list[float], list[str]]

SCALES: tuple[Scale, ...] = ("log", "linear")


def positions(steps: NDArray[Any]) -> Array:
    """Return where steps lie on the axis: 1 + step, so that step 0 has a logarithm."""
    return np.asarray(steps, dtype=np.float64) + 1.0


def edges(steps: NDArray[Any]) -> Array:
    """Return the borders of the cells around ``steps``: half-way between two on the log scale, ``[steps + 1]``."""
    at = positions(steps)
    if at.size == 1:
        return np.array([at[0] / 1.5, at[0] * 1.5])
    middle = np.sqrt(at[:-1] * at[1:])
    return np.concatenate([[at[0] ** 2 / middle[0]], middle, [at[-1] ** 2 / middle[-1]]])


def count(number: float) -> str:
    """Return a count as an axis label: ``0``, ``500``, ``1k``, ``2.5M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def ticks(scale: Scale, low: float, high: float) -> Ticks:
    """Return positions and labels of the axis ticks for cell borders ``low`` to ``high`` (in positions)."""
    first, last = max(low - 1.0, 0.0), max(high - 1.0, 0.0)
    steps = _decades(first, last) if scale == "log" else _round_numbers(first, last)
    return [step + 1.0 for step in steps], [count(step) for step in steps]


def _decades(first: float, last: float) -> list[float]:
    powers = [10.0**power for power in range(13)]
    for factors in ((1,), (1, 3), (1, 2, 5)):
        chosen = [f * power for power in powers for f in factors if first <= f * power <= last]
        if len(chosen) >= 3:
            end = [f * chosen[-1] for f in (5, 3) if f * chosen[-1] <= last][:1]
            return [*([0.0] if first < 0.5 else []), *chosen, *end]
    return _round_numbers(first, last)


def _round_numbers(first: float, last: float) -> list[float]:
    found = MaxNLocator(nbins=5, integer=True).tick_values(first, last)
    return [float(step) for step in found if first <= step <= last]


def plotly_axis(scale: Scale, borders: Sequence[float]) -> dict[str, Any]:
    """Return the settings of a plotly axis that spans ``borders`` (in positions) on ``scale``."""
    low, high = min(borders), max(borders)
    values, texts = ticks(scale, low, high)
    span = [float(np.log10(low)), float(np.log10(high))] if scale == "log" else [low, high]
    return {"type": scale, "range": span, "tickmode": "array", "tickvals": values, "ticktext": texts}
