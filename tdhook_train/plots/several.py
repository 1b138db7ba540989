"""The same pictures of several runs as one: of three and more the mean with an interval, of fewer each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from tdhook_train.plots.charts import Chart, HeatChart, ImageChart, LineChart
from tdhook_train.plots.panels import Array, HeatPanel, Line, LinePanel, Mark, Style
from tdhook_train.plots.sections.section import Listing, Picture, Section

__all__ = ["ENOUGH", "heat_panels_together", "interval", "line_panels_together", "together"]

ENOUGH = 3  # runs, for a mean with an interval
_STYLES: tuple[Style, ...] = ("solid", "dash", "dot")
_MEANS = "Mean over {} runs, and the 95 % interval of that mean (Student's t); the hover has its ends."
_Panel = TypeVar("_Panel", HeatPanel, LinePanel)
_Item = TypeVar("_Item")


def together(by_run: Mapping[str, Sequence[Section]]) -> list[Section]:
    """Join the sections of several runs, by title, and their pictures, by title."""
    return [_section(title, parts) for title, parts in _by_title(by_run).items()]


def _by_title(by_run: Mapping[str, Sequence[_Item]]) -> dict[str, dict[str, _Item]]:
    """Return what every run has, by title and then by run; titles in the order they first come."""
    found: dict[str, dict[str, _Item]] = {}
    for label, items in by_run.items():
        for item in items:
            found.setdefault(item.title, {})[label] = item  # type: ignore[attr-defined]
    return found


def _section(title: str, parts: Mapping[str, Section]) -> Section:
    pictures = _by_title({label: part.pictures for label, part in parts.items()})
    joined = [picture for name, own in pictures.items() for picture in _pictures(name, own)]
    missing = next((part.missing for part in parts.values() if part.missing), "")
    return Section(title, tuple(joined), "" if joined else missing)


def _pictures(title: str, own: Mapping[str, Picture]) -> Iterator[Picture]:
    first = next(iter(own.values()))
    if any(isinstance(picture.chart, ImageChart) for picture in own.values()):
        yield from (replace(picture, title=f"{title} · {label}") for label, picture in own.items())
        return
    charts = {label: picture.chart for label, picture in own.items() if picture.chart is not None}
    told = [f"{label}: {picture.note.strip()}" for label, picture in own.items() if picture.note.strip()]
    if len(charts) >= ENOUGH:
        told.insert(0, _MEANS.format(len(charts)))
    elif charts and len(charts) < len(own):
        told.insert(0, f"Drawn: {', '.join(charts)}.")
    listings = _by_title({label: picture.listings for label, picture in own.items()})
    yield Picture(
        title,
        first.caption,
        _chart(charts) if charts else None,
        " ".join(told),
        tuple(_listing(name, each) for name, each in listings.items()),
    )


def _listing(title: str, each: Mapping[str, Listing]) -> Listing:
    first = next(iter(each.values()))
    rows = [(label, *row) for label, listing in each.items() for row in listing.rows]
    return Listing(("run", *first.header), rows, title)


def _chart(charts: Mapping[str, Chart]) -> Chart:
    heats = {label: chart for label, chart in charts.items() if isinstance(chart, HeatChart)}
    lines = {label: chart for label, chart in charts.items() if isinstance(chart, LineChart)}
    if heats:
        first = next(iter(heats.values()))
        limits = (min(chart.limits[0] for chart in heats.values()), max(chart.limits[1] for chart in heats.values()))
        panels = heat_panels_together({label: chart.panels for label, chart in heats.items()})
        return replace(first, panels=panels, limits=limits, marks=_marks(heats)[0])
    panels_ = line_panels_together({label: chart.panels for label, chart in lines.items()})
    marks, at = _marks(lines)
    return LineChart(panels_, marks, at)


def _marks(charts: Mapping[str, HeatChart] | Mapping[str, LineChart]) -> tuple[list[Mark], list[float] | None]:
    """Return the marks of all runs, those that not every run has with its label, and where they lie."""
    given = {label: [(mark.step, mark.text) for mark in chart.marks] for label, chart in charts.items()}
    marks: dict[Mark, float] = {}
    for label, chart in charts.items():
        places = getattr(chart, "at", None)
        for number, mark in enumerate(chart.marks):
            shared = all((mark.step, mark.text) in others for others in given.values())
            known = mark if shared else Mark(mark.step, f"{label}: {mark.text}")
            marks.setdefault(known, float(mark.step) if places is None else places[number])
    elsewhere = any(getattr(chart, "at", None) is not None for chart in charts.values())
    return list(marks), list(marks.values()) if elsewhere else None


def interval(values: Array) -> tuple[Array, Array, Array]:
    """Return the mean over the first axis and the ends of its 95 % interval; NaN ends of fewer than two numbers."""
    known = np.isfinite(values)
    count = known.sum(0)
    filled = np.where(known, values, 0.0)
    mean = np.where(count > 0, filled.sum(0) / np.maximum(count, 1), np.nan)
    squares = np.where(known, (values - mean) ** 2, 0.0).sum(0)
    error = np.sqrt(squares / np.maximum(count - 1, 1) / np.maximum(count, 1))
    half = np.where(count > 1, stdtrit(np.maximum(count - 1, 1), 0.975) * error, np.nan)
    return mean, mean - half, mean + half


# ------------------------------------------------------------------ maps


def heat_panels_together(by_run: Mapping[str, Sequence[HeatPanel]]) -> list[HeatPanel]:
    """Join the maps of several runs: the mean at the steps that all have, or, of fewer than three, each."""
    return _joined(by_run, _mean_map)


def _joined(by_run: Mapping[str, Sequence[_Panel]], mean: Callable[[list[_Panel]], _Panel | None]) -> list[_Panel]:
    if len(by_run) == 1:
        return list(next(iter(by_run.values())))
    joined: list[_Panel] = []
    for title, own in _by_title(by_run).items():
        one = mean(list(own.values())) if len(own) >= ENOUGH else None
        each = (replace(panel, title=f"{title} · {label}" if title else label) for label, panel in own.items())
        joined += each if one is None else [one]
    return joined


def _mean_map(panels: list[HeatPanel]) -> HeatPanel | None:
    """Return the mean; None where the runs have no steps or other rows in common."""
    first = panels[0]
    steps = reduce(np.intersect1d, [panel.steps for panel in panels])
    if not steps.size or any(panel.labels != first.labels or panel.columns != first.columns for panel in panels):
        return None
    at = [np.searchsorted(panel.steps, steps) for panel in panels]

    def stacked(parts: Sequence[NDArray[Any]]) -> Array:
        return np.stack([part[..., chosen] for part, chosen in zip(parts, at, strict=True)])

    mean, low, high = interval(stacked([panel.values for panel in panels]))
    hidden = stacked([panel.hidden for panel in panels]).mean(0)
    dots = [panel.dots for panel in panels if panel.dots is not None]
    below = [panel.below for panel in panels if panel.below is not None]
    every = len(panels)
    return replace(
        first,
        steps=steps,
        values=mean,
        grey=hidden > 0.5,
        dots=stacked(dots).mean(0) > 0.5 if len(dots) == every else None,
        below=(below[0][0], interval(stacked([values for _, values in below]))[0]) if len(below) == every else None,
        hover={"from": low, "to": high, **_common_hover(panels, stacked)},
    )


def _common_hover(panels: Sequence[HeatPanel], stacked: Callable[[Sequence[Array]], Array]) -> dict[str, Array]:
    shared = [name for name in panels[0].hover if all(name in panel.hover for panel in panels)]
    return {f"mean {name}": interval(stacked([panel.hover[name] for panel in panels]))[0] for name in shared}


# ------------------------------------------------------------------ lines


def line_panels_together(by_run: Mapping[str, Sequence[LinePanel]]) -> list[LinePanel]:
    """Join the lines of several runs by name: their mean with a band, or, of fewer than three runs, each."""
    stacked = any(panel.kind == "stacked" for panels in by_run.values() for panel in panels)
    if stacked or len(by_run) == 1:
        return _joined(by_run, _mean_lines)
    return [
        _mean_lines(list(own.values())) if len(own) >= ENOUGH else _overlaid(own) for own in _by_title(by_run).values()
    ]


def _overlaid(own: Mapping[str, LinePanel]) -> LinePanel:
    drawn = [
        replace(line, name=f"{line.name} · {label}", style=_STYLES[number % len(_STYLES)])
        for number, (label, panel) in enumerate(own.items())
        for line in panel.lines
    ]
    return replace(next(iter(own.values())), lines=tuple(drawn), limits=_limits(list(own.values())))


def _limits(panels: Sequence[LinePanel]) -> tuple[float, float] | None:
    known = [panel.limits for panel in panels if panel.limits is not None]
    if len(known) < len(panels):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def _mean_lines(panels: list[LinePanel]) -> LinePanel:
    named: dict[str, list[Line]] = {}
    for panel in panels:
        for line in panel.lines:
            named.setdefault(line.name, []).append(line)
    drawn = tuple(_mean_line(own) for own in named.values())
    if panels[0].kind == "stacked":
        drawn = tuple(replace(line, low=None, high=None) for line in drawn)
    return replace(panels[0], lines=drawn, limits=_limits(panels))


def _mean_line(own: Sequence[Line]) -> Line:
    """Return the mean of lines on all points of any, each between its own ends, straight between its points."""
    points = np.unique(np.concatenate([line.x for line in own]))
    mean, low, high = interval(np.stack([_at(line, points) for line in own]))
    enough = np.isfinite(low).any()
    return replace(own[0], x=points, y=mean, hover={}, low=low if enough else None, high=high if enough else None)


def _at(line: Line, points: NDArray[np.generic]) -> Array:
    known = np.isfinite(line.y)
    if not known.any():
        return np.full(len(points), np.nan)
    x = np.asarray(line.x, dtype=np.float64)[known]
    return np.interp(points.astype(np.float64), x, line.y[known], left=np.nan, right=np.nan)
