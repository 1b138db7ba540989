"""The numbers behind a chart, as tables: what can be read with JavaScript off, by a screen reader, or copied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tdhook_train.plots.charts import Chart, HeatChart, LineChart
from tdhook_train.plots.panels import Array, HeatPanel, LinePanel
from tdhook_train.plots.sections.section import Listing

__all__ = ["listings"]

_TICKS = 12
_NONE = "–"


def listings(chart: Chart) -> list[Listing]:
    """Return a table a panel: a row for each layer or line, at some ticks from the first to the last.

    Behind a number, ``~`` stands where the map has a dot, and brackets stand around what the map shows grey.
    """
    if isinstance(chart, HeatChart):
        return [_map(panel, chart.unit) for panel in chart.panels]
    return [_series(panel) for panel in chart.panels] if isinstance(chart, LineChart) else []


def _chosen(steps: NDArray[np.generic]) -> NDArray[np.intp]:
    """Return the places of at most ``_TICKS`` steps, as far apart as may be on the log scale; first and last are in."""
    if len(steps) <= _TICKS:
        return np.arange(len(steps))
    at = np.log1p(np.maximum(np.asarray(steps, dtype=np.float64), 0.0))
    wanted = np.linspace(at[0], at[-1], _TICKS)
    return np.unique(np.abs(at[:, None] - wanted).argmin(0))


def _map(panel: HeatPanel, unit: str) -> Listing:
    chosen = np.arange(len(panel.columns)) if panel.columns else _chosen(panel.steps)
    header = panel.columns or [f"{step:,}" for step in panel.steps[chosen].tolist()]
    dots = np.zeros(panel.values.shape, dtype=bool) if panel.dots is None else panel.dots
    rows = [
        (name, *(_cell(values[place], grey[place], dot[place]) for place in chosen))
        for name, values, grey, dot in zip(panel.labels, panel.values, panel.hidden, dots, strict=True)
    ]
    if panel.below:
        rows.append((panel.below[0], *(_number(value) for value in panel.below[1][chosen])))
    what = "" if panel.columns else f" at {len(chosen)} of {len(panel.steps)} ticks"
    return Listing((unit, *header), rows, f"{panel.title or unit}{what}")


def _cell(value: float, grey: bool, dot: bool) -> str:
    text = _number(value)
    if text == _NONE:
        return text
    return f"({text})" if grey else f"{text} ~" if dot else text


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else _NONE


def _series(panel: LinePanel) -> Listing:
    given = [line.x for line in panel.lines]
    points = np.unique(np.concatenate(given)) if given else np.empty(0)
    points = points[_chosen(points)]
    rows = []
    for line in panel.lines:
        rows.append((line.name, *_at(line.x, line.y, points)))
        if line.low is not None and line.high is not None:
            ends = zip(_at(line.x, line.low, points), _at(line.x, line.high, points), strict=True)
            rows.append((f"{line.name}: 95 % interval", *(f"{low} to {high}" for low, high in ends)))
    count = "frames" if panel.x == "frames" else "steps"
    header = (panel.unit, *(f"{point:,}" for point in points.tolist()))
    return Listing(header, rows, f"{panel.title or panel.unit} at {len(points)} {count}")


def _at(x: NDArray[np.generic], y: Array, points: Sequence[float] | NDArray[np.generic]) -> list[str]:
    known = dict(zip(x.tolist(), y.tolist(), strict=True))
    return [_number(known.get(point, np.nan)) for point in np.asarray(points).tolist()]
