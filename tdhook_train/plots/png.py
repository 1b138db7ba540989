"""The main figure of a run as one PNG, drawn with matplotlib without touching its global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from tdhook_train.plots.labels import thin_out
from tdhook_train.plots.panels import HeatPanel, LinePanel, Mark
from tdhook_train.plots.sections import attribution, health, probe, saliency
from tdhook_train.plots.sections import training as curve
from tdhook_train.plots.source import marks
from tdhook_train.plots.step_axis import count, edges, positions, ticks
from tdhook_train.plots.style import FAINT, FEW, GREY, INK, MAP

if TYPE_CHECKING:
    import pandas as pd

    from tdhook_train.buffer import ArtifactBuffer

__all__ = ["write"]

_WIDTH, _HEIGHT, _DPI = 16.0, 10.0, 100  # 1600 × 1000 pixels
_BODY, _SMALL, _HEAD = 11.5, 10.0, 18.0  # points; the picture is shown at little more than half its size
_TARGETS = 3
_ROW_LABELS = 7
_END_LABELS = 5
_LONGEST = 22


def write(buffer: ArtifactBuffer, path: Path, *, training: pd.DataFrame | None, title: str) -> None:
    """Write the main figure: return over frames, what-when-where for three targets, attribution and health."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    noted = marks(buffer)
    figure.text(0.02, 0.972, title, fontsize=_HEAD, fontweight="bold", color=INK, va="center")
    top = 0.86
    if training is not None and training.get("return") is not None and training["return"].notna().any():
        _return(figure.add_axes((0.085, 0.795, 0.9, 0.13)), training, noted)
        top = 0.69
    chosen = main_targets(probe.targets(buffer))
    beside = _side(figure, buffer, noted, (0.68 if chosen else 0.085, top))
    if chosen:
        _heat_maps(figure, buffer, noted, (0.605 if beside else 0.985, top), chosen)
    else:
        figure.text(0.085, 0.03, "No probe was recorded.", fontsize=_BODY, color=INK)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar in a label is a dollar
    figure.savefig(path, dpi=_DPI)


def main_targets(known: Sequence[str]) -> list[str]:
    """Return the three targets of the picture: action, value, a velocity, and others in their order where one lacks."""
    wanted = [name for name in ("action", "value") if name in known]
    wanted += [name for name in known if "velocity" in name.lower()][:1]
    return [*wanted, *(name for name in known if name not in wanted)][:_TARGETS]


def _return(axes: Axes, training: pd.DataFrame, noted: Sequence[Mark]) -> None:
    for line in curve.panel(training).lines:
        faint = line.color == FAINT
        axes.plot(
            line.x, line.y, color=line.color, lw=1.2 if faint else 2.4, marker="o" if len(line.x) <= FEW else "", ms=4
        )
    for mark, frames in zip(noted, curve.frames_at(training, [mark.step for mark in noted]), strict=True):
        axes.axvline(frames, color=INK, lw=1, ls="--")
        label = axes.text(frames, 0.97, mark.text, fontsize=_SMALL, color=INK, va="top", ha="right", rotation=90)
        label.set_transform(axes.get_xaxis_transform())
    _dress(axes, "return per episode")
    axes.xaxis.set_major_formatter(lambda frames, _: count(frames))
    axes.yaxis.set_major_formatter(lambda value, _: count(value))
    axes.set_xlabel("environment frames", fontsize=_BODY, color=INK, labelpad=1)
    axes.margins(x=0.005)


def _heat_maps(
    figure: Figure,
    buffer: ArtifactBuffer,
    noted: Sequence[Mark],
    corner: tuple[float, float],
    chosen: Sequence[str],
) -> None:
    right, top = corner
    panels = {target: probe.panels(buffer, target)[:2] for target in chosen}
    columns = max(len(found) for found in panels.values())
    grid = GridSpec(len(chosen), columns, figure, 0.085, 0.125, right, top, wspace=0.33, hspace=0.24)
    for row, (target, found) in enumerate(panels.items()):
        for column, panel in enumerate(found):
            axes = figure.add_subplot(grid[row, column])
            _heat(axes, panel, noted, last=row == len(chosen) - 1)
            axes.set_title(f"{target} · {panel.title}", fontsize=_BODY, loc="left", color=INK, pad=4)
    _headline(figure, (0.02, top + 0.035), "What each layer knows: R² of a linear probe, layer × training step")
    _key(figure)


def _headline(figure: Figure, at: tuple[float, float], text: str) -> None:
    figure.text(*at, text, fontsize=_BODY + 1, fontweight="bold", color=INK)


def _heat(axes: Axes, panel: HeatPanel, noted: Sequence[Mark], *, last: bool) -> None:
    borders = edges(panel.steps)
    axes.set_facecolor(GREY)
    layers = np.arange(len(panel.rows) + 1)
    axes.pcolormesh(borders, layers, np.ma.masked_invalid(panel.shown), cmap=MAP, vmin=0, vmax=1)
    low = 0.0
    if panel.below:
        low = panel.under[0]
        axes.axhspan(panel.under[1], 0, color="white")
        axes.pcolormesh(borders, panel.under, np.ma.masked_invalid(panel.below[1][None]), cmap=MAP, vmin=0, vmax=1)
    if panel.dots is not None:
        row, column = panel.stippled
        axes.scatter(positions(panel.steps)[column], row + 0.5, s=5, c="white", edgecolors="#00000080", linewidths=0.5)
    axes.set_ylim(low, len(panel.rows))
    rows = thin_out(panel.rows, _ROW_LABELS)
    under = [panel.below[0].replace("observation", "obs.")] if panel.below else []
    texts = [*under, *(_cut(panel.rows[row]) for row in rows)]
    axes.set_yticks([sum(panel.under) / 2] * len(under) + [row + 0.5 for row in rows], texts)
    _step_axis(axes, (borders[0], borders[-1]), noted)
    axes.tick_params(labelsize=_SMALL, colors=INK, length=2, labelbottom=last)
    if last:
        axes.set_xlabel("optimizer steps", fontsize=_BODY, color=INK, labelpad=1)
    for side in axes.spines.values():
        side.set_visible(False)


def _key(figure: Figure) -> None:
    """Draw the colour bar, and what grey and dots mean, under the heat maps."""
    bar = figure.add_axes((0.085, 0.048, 0.13, 0.016))
    scale = ScalarMappable(Normalize(0, 1), MAP)
    figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=[0, 0.5, 1])
    bar.tick_params(labelsize=_SMALL, colors=INK, length=2)
    figure.text(0.08, 0.056, "R²", fontsize=_BODY, color=INK, ha="right", va="center")
    dot = Line2D([], [], ls="", marker="o", ms=3.5, mfc="white", mec="black", mew=0.6)
    figure.legend(
        [Patch(color=GREY), dot],
        ["does not beat the null", "no better than before training"],
        loc="center left",
        bbox_to_anchor=(0.225, 0.05),
        ncols=2,
        fontsize=_SMALL,
        frameon=False,
        columnspacing=1.2,
    )


def _side(figure: Figure, buffer: ArtifactBuffer, noted: Sequence[Mark], corner: tuple[float, float]) -> bool:
    """Draw attribution and health, and return whether there was any."""
    left, top = corner
    shown = [("Attribution: ", panel) for panel in attribution.panels(buffer)[:2]]
    maps = saliency.maps(buffer)
    whole = health.overview(buffer)
    shown += [("Health, ", whole)] if whole is not None else []
    if not shown and not maps:
        return False
    grid = GridSpec(len(shown) + bool(maps), 1, figure, left, 0.125, 0.875, top, hspace=0.36)
    if maps:
        _images(figure, grid[0, 0], maps[0])
    for row, (kind, panel) in enumerate(shown, int(bool(maps))):
        axes = figure.add_subplot(grid[row, 0])
        _lines(axes, panel, noted)
        axes.set_title(kind + panel.title, fontsize=_BODY, loc="left", color=INK, pad=4)
    if shown:
        axes.set_xlabel("optimizer steps", fontsize=_BODY, color=INK, labelpad=1)
    _headline(figure, (left - 0.025, top + 0.035), "What decides, and what is in use")
    return True


def _images(figure: Figure, at: SubplotSpec, maps: saliency.Maps) -> None:
    """Draw the mean image, where there is one, and the maps of one output at the first and the last tick."""
    pictures = [panel for panel in maps.panels if not panel.is_map]
    ticks = [panel for panel in maps.panels if panel.is_map]
    drawn = [*pictures, *(ticks if len(ticks) < 2 else (ticks[0], ticks[-1]))]
    largest = max(float(np.nanmax(panel.values, initial=0.0)) for panel in ticks) or 1.0
    grid = at.subgridspec(1, len(drawn), wspace=0.08)
    for column, panel in enumerate(drawn):
        axes = figure.add_subplot(grid[0, column])
        looks = {"cmap": MAP, "vmin": 0, "vmax": largest} if panel.is_map else {"cmap": "gray"}
        axes.imshow(panel.values, interpolation="nearest", **looks)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(panel.title, fontsize=_SMALL, loc="left", color=INK, pad=3)
        if column == 0:
            axes.text(0, 1.22, f"Attribution: {maps.title}", fontsize=_BODY, color=INK, transform=axes.transAxes)


def _lines(axes: Axes, panel: LinePanel, noted: Sequence[Mark]) -> None:
    styles = {"solid": "-", "dash": "--", "dot": ":"}
    borders = [edges(line.x)[[0, -1]] for line in panel.lines if line.x.size]
    for line in panel.lines:
        width = 1.0 if line.weight == "faint" else 2.2
        marker = "." if len(line.x) <= FEW else ""
        style = styles[line.style]
        axes.plot(positions(line.x), line.y, color=line.color or FAINT, lw=width, ls=style, marker=marker)
    _dress(axes, panel.unit.partition(" (")[0])
    if borders:
        span = np.concatenate(borders)
        _step_axis(axes, (span.min(), span.max()), noted)
    axes.set_ylim(bottom=0)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    _end_labels(axes, panel)


def _end_labels(axes: Axes, panel: LinePanel) -> None:
    """Name the lines that end highest at their right end, pushed apart where they would overlap."""
    named = [line for line in panel.lines if line.weight == "normal" and line.style == "solid" and len(line.y)]
    named = [line for line in named if np.isfinite(line.y[-1])]
    named = sorted(named, key=lambda line: -line.y[-1])[:_END_LABELS]
    low, high = axes.get_ylim()
    heights = spread([(line.y[-1] - low) / (high - low) for line in named], gap=0.105)
    for line, height in zip(named, heights, strict=True):
        text = _cut(line.name.partition(":")[0])
        axes.text(1.02, height, text, transform=axes.transAxes, fontsize=_SMALL, color=line.color, va="center")


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


def _dress(axes: Axes, unit: str) -> None:
    axes.set_ylabel(unit, fontsize=_BODY, color=INK)
    axes.tick_params(labelsize=_SMALL, colors=INK, length=2)
    axes.grid(axis="y", color="#e8eaed", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def _step_axis(axes: Axes, borders: tuple[float, float], noted: Sequence[Mark]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*borders)
    axes.set_xticks([], minor=True)
    axes.set_xticks(*ticks("log", *borders))
    for mark in noted:
        axes.axvline(mark.step + 1, color=INK, lw=1, ls="--")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
