"""Panels drawn on matplotlib's axes, none of its global state touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh

from tdhook_train.plots.heat_map import borders
from tdhook_train.plots.labels import thin_out
from tdhook_train.plots.panels import HeatPanel, LinePanel, Mark
from tdhook_train.plots.step_axis import edges, positions, ticks
from tdhook_train.plots.style import FAINT, FEW, GREY, INK, MAP, short

__all__ = ["BODY", "SMALL", "cut", "draw_heat", "draw_lines", "dress", "note_marks", "spread"]

BODY, SMALL = 11.5, 10.0  # points; a picture is often shown at little more than half its size
_ROW_LABELS = 7
_END_LABELS = 5
_LONGEST = 22


def draw_heat(
    axes: Axes,
    panel: HeatPanel,
    noted: Sequence[Mark] = (),
    *,
    limits: tuple[float, float] = (0.0, 1.0),
    last: bool = True,
    labels: bool = True,
) -> QuadMesh:
    """Draw a map, and return what a colour bar needs.

    Args:
        axes: where to.
        panel: what to draw.
        noted: events drawn as vertical lines.
        limits: values at the ends of the colours.
        last: whether the horizontal axis has labels.
        labels: whether the events have.
    """
    across = borders(panel)
    axes.set_facecolor(GREY)
    colors: dict[str, Any] = {"cmap": MAP, "vmin": limits[0], "vmax": limits[1]}
    drawn = axes.pcolormesh(across, np.arange(len(panel.rows) + 1), np.ma.masked_invalid(panel.shown), **colors)
    _beside(axes, panel, colors)
    axes.tick_params(labelsize=SMALL, colors=INK, length=2, labelbottom=last)
    for side in axes.spines.values():
        side.set_visible(False)
    if panel.columns:
        shown = thin_out(panel.columns, _ROW_LABELS)
        names = [cut(panel.columns[place]) for place in shown]
        axes.set_xticks([place + 0.5 for place in shown], names, rotation=60, ha="right")
        return drawn
    _step_axis(axes, (across[0], across[-1]))
    note_marks(axes, noted, [mark.step + 1.0 for mark in noted], labels=labels)
    if last:
        axes.set_xlabel("optimizer steps", fontsize=BODY, color=INK, labelpad=1)
    return drawn


def _beside(axes: Axes, panel: HeatPanel, colors: dict[str, Any]) -> None:
    """Draw the row under the layers, the dots, and the labels of the rows."""
    low = 0.0
    if panel.below:
        low = panel.under[0]
        axes.axhspan(panel.under[1], 0, color="white")
        axes.pcolormesh(borders(panel), panel.under, np.ma.masked_invalid(panel.below[1][None]), **colors)
    if panel.dots is not None:
        row, column = panel.stippled
        axes.scatter(positions(panel.steps)[column], row + 0.5, s=5, c="white", edgecolors="#00000080", linewidths=0.5)
    axes.set_ylim(low, len(panel.rows))
    rows = thin_out(panel.rows, _ROW_LABELS)
    under = [cut(panel.below[0].replace("observation", "obs."))] if panel.below else []
    texts = [*under, *(cut(panel.rows[row]) for row in rows)]
    axes.set_yticks([sum(panel.under) / 2] * len(under) + [row + 0.5 for row in rows], texts)


def draw_lines(axes: Axes, panel: LinePanel, noted: Sequence[Mark] = (), *, labels: bool = True) -> None:
    """Draw series over steps, those that end highest named at their ends.

    Args:
        axes: where to.
        panel: what to draw.
        noted: events drawn as vertical lines.
        labels: whether these have labels.
    """
    styles = {"solid": "-", "dash": "--", "dot": ":"}
    ends = [edges(line.x)[[0, -1]] for line in panel.lines if line.x.size]
    for line in panel.lines:
        width = 1.0 if line.weight == "faint" else 2.2
        marker = "." if len(line.x) <= FEW else ""
        color = line.color or FAINT
        axes.plot(positions(line.x), line.y, color=color, lw=width, ls=styles[line.style], marker=marker)
        if line.low is not None and line.high is not None:
            axes.fill_between(positions(line.x), line.low, line.high, color=color, alpha=0.18, lw=0)
    dress(axes, panel.unit.partition(" (")[0])
    if ends:
        span = np.concatenate(ends)
        _step_axis(axes, (span.min(), span.max()))
    if panel.floor == "zero":
        axes.set_ylim(bottom=0)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    note_marks(axes, noted, [mark.step + 1.0 for mark in noted], labels=labels)
    _end_labels(axes, panel)


def note_marks(axes: Axes, noted: Sequence[Mark], at: Sequence[float], *, labels: bool = True) -> None:
    """Draw a dashed line for each event, with what happened beside it."""
    for mark, place in zip(noted, at, strict=True):
        axes.axvline(place, color=INK, lw=1, ls="--")
        if labels:
            label = axes.text(
                place, 0.97, short(mark.text), fontsize=SMALL, color=INK, va="top", ha="right", rotation=90
            )
            label.set_transform(axes.get_xaxis_transform())
            label.set_bbox({"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1})
            label.set_clip_on(True)


def _end_labels(axes: Axes, panel: LinePanel) -> None:
    """Name the lines that end highest at their right end, pushed apart where they would overlap."""
    named = [line for line in panel.lines if line.weight == "normal" and line.style == "solid" and len(line.y)]
    named = [line for line in named if np.isfinite(line.y[-1])]
    named = sorted(named, key=lambda line: -line.y[-1])[:_END_LABELS]
    low, high = axes.get_ylim()
    heights = spread([(line.y[-1] - low) / (high - low) for line in named], gap=0.105)
    for line, height in zip(named, heights, strict=True):
        text = cut(line.name.partition(":")[0])
        axes.text(1.02, height, text, transform=axes.transAxes, fontsize=SMALL, color=line.color, va="center")


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Return descending heights in 0 to 1 at least ``gap`` apart, each as near as may be to where it was."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - gap) if placed else min(height, 1.0))
    floor = 0.0
    for place in reversed(range(len(placed))):
        placed[place] = max(placed[place], floor)
        floor = placed[place] + gap
    return placed


def dress(axes: Axes, unit: str) -> None:
    """Give an axes of lines the report's look."""
    axes.set_ylabel(unit, fontsize=BODY, color=INK)
    axes.tick_params(labelsize=SMALL, colors=INK, length=2)
    axes.grid(axis="y", color="#e8eaed", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def _step_axis(axes: Axes, span: tuple[float, float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*span)
    axes.set_xticks([], minor=True)
    axes.set_xticks(*ticks("log", *span))


def cut(text: str) -> str:
    """Return a label that has room beside an axis."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
