"""The main figure of a run as one PNG, drawn with matplotlib without touching its global state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

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

from tdhook_train.plots.axes import BODY, SMALL, cut, draw_heat, draw_lines, dress, note_marks
from tdhook_train.plots.panels import HeatPanel, Mark
from tdhook_train.plots.sections import attribution, health, probe, saliency
from tdhook_train.plots.sections import training as curve
from tdhook_train.plots.several import heat_panels_together, line_panels_together
from tdhook_train.plots.source import marks
from tdhook_train.plots.step_axis import count
from tdhook_train.plots.style import FAINT, FEW, GREY, INK, MAP, short

if TYPE_CHECKING:
    import pandas as pd

    from tdhook_train.buffer import ArtifactBuffer

__all__ = ["write"]

_WIDTH, _HEIGHT, _DPI = 16.0, 10.0, 100  # 1600 × 1000 pixels
_HEAD = 18.0  # points
_TARGETS = 3


Runs: TypeAlias = "Mapping[str, ArtifactBuffer]"


def write(runs: Runs, path: Path, *, training: Mapping[str, pd.DataFrame], title: str) -> None:
    """Write the main figure: return over frames, what-when-where for three targets, attribution and health.

    Args:
        runs: by label; what several share is drawn as the report draws it.
        path: of the picture.
        training: curves by the label of their run.
        title: its heading.
    """
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    noted = list(dict.fromkeys(mark for run in runs.values() for mark in marks(run)))
    figure.text(0.02, 0.972, short(title, 110), fontsize=_HEAD, fontweight="bold", color=INK, va="center")
    top = 0.86
    curves = {
        label: own for label, own in training.items() if own.get("return") is not None and own["return"].notna().any()
    }
    if curves:
        _return(figure.add_axes((0.085, 0.795, 0.9, 0.13)), curves, noted)
        top = 0.69
    chosen = main_targets(list(dict.fromkeys(target for run in runs.values() for target in probe.targets(run))))
    beside = _side(figure, runs, noted, (0.68 if chosen else 0.085, top))
    if chosen:
        _heat_maps(figure, runs, noted, (0.605 if beside else 0.985, top), chosen)
    else:
        figure.text(0.085, 0.03, "No probe was recorded.", fontsize=BODY, color=INK)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar in a label is a dollar
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ ", UserWarning)  # a box stands where no font has the sign
        figure.savefig(path, dpi=_DPI)


def main_targets(known: Sequence[str]) -> list[str]:
    """Return the three targets of the picture: action, value, a velocity, and others in their order where one lacks."""
    wanted = [name for name in ("action", "value") if name in known]
    wanted += [name for name in known if "velocity" in name.lower()][:1]
    return [*wanted, *(name for name in known if name not in wanted)][:_TARGETS]


def _return(axes: Axes, curves: Mapping[str, pd.DataFrame], noted: Sequence[Mark]) -> None:
    styles = {"solid": "-", "dash": "--", "dot": ":"}
    (panel,) = line_panels_together({label: [curve.panel(own)] for label, own in curves.items()})
    for line in panel.lines:
        width, marker = 1.2 if line.color == FAINT else 2.4, "o" if len(line.x) <= FEW else ""
        axes.plot(line.x, line.y, color=line.color, lw=width, ls=styles[line.style], marker=marker, ms=4)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.18, lw=0)
    note_marks(axes, noted, curve.frames_at(next(iter(curves.values())), [mark.step for mark in noted]))
    dress(axes, "return per episode")
    axes.xaxis.set_major_formatter(lambda frames, _: count(frames))
    axes.yaxis.set_major_formatter(lambda value, _: count(value))
    axes.set_xlabel("environment frames", fontsize=BODY, color=INK, labelpad=1)
    axes.margins(x=0.005)


def _heat_maps(
    figure: Figure,
    runs: Runs,
    noted: Sequence[Mark],
    corner: tuple[float, float],
    chosen: Sequence[str],
) -> None:
    right, top = corner
    panels = {target: _maps(runs, target)[:2] for target in chosen}
    columns = max(len(found) for found in panels.values())
    grid = GridSpec(len(chosen), columns, figure, 0.085, 0.125, right, top, wspace=0.33, hspace=0.24)
    for row, (target, found) in enumerate(panels.items()):
        for column, panel in enumerate(found):
            axes = figure.add_subplot(grid[row, column])
            draw_heat(axes, panel, noted, last=row == len(chosen) - 1, labels=row == 0)
            axes.set_title(short(f"{target} · {panel.title}", 44), fontsize=BODY, loc="left", color=INK, pad=4)
    unit = next(unit for run in runs.values() if (unit := probe.unit(run)))
    _headline(figure, (0.02, top + 0.035), f"What each layer knows: {unit} of a linear probe, layer × training step")
    _key(figure, unit)


def _maps(runs: Runs, target: str) -> list[HeatPanel]:
    shown = {label: probe.panels(run, target) for label, run in runs.items() if target in probe.targets(run)}
    return heat_panels_together(shown)


def _headline(figure: Figure, at: tuple[float, float], text: str) -> None:
    figure.text(*at, text, fontsize=BODY + 1, fontweight="bold", color=INK)


def _key(figure: Figure, unit: str) -> None:
    """Draw the colour bar, and what grey and dots mean, under the heat maps."""
    bar = figure.add_axes((0.085, 0.048, 0.13, 0.016))
    scale = ScalarMappable(Normalize(0, 1), MAP)
    figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=[0, 0.5, 1])
    bar.tick_params(labelsize=SMALL, colors=INK, length=2)
    figure.text(0.08, 0.056, "R²" if unit == "R²" else "", fontsize=BODY, color=INK, ha="right", va="center")
    dot = Line2D([], [], ls="", marker="o", ms=3.5, mfc="white", mec="black", mew=0.6)
    figure.legend(
        [Patch(color=GREY), dot],
        ["does not beat the null", "no better than before training"],
        loc="center left",
        bbox_to_anchor=(0.225, 0.05),
        ncols=2,
        fontsize=SMALL,
        frameon=False,
        columnspacing=1.2,
    )


def _side(figure: Figure, runs: Runs, noted: Sequence[Mark], corner: tuple[float, float]) -> bool:
    """Draw attribution and health, and return whether there was any."""
    left, top = corner
    attributed = line_panels_together({label: attribution.panels(run) for label, run in runs.items()})
    in_use = {label: [whole] for label, run in runs.items() if (whole := health.overview(run)) is not None}
    shown = [("Attribution: ", panel) for panel in attributed[:2]]
    maps = next((found for run in runs.values() if (found := saliency.maps(run))), [])
    shown += [("Health, ", panel) for panel in (line_panels_together(in_use)[:1] if in_use else [])]
    if not shown and not maps:
        return False
    grid = GridSpec(len(shown) + bool(maps), 1, figure, left, 0.125, 0.875, top, hspace=0.36)
    if maps:
        _images(figure, grid[0, 0], maps[0])
    for row, (kind, panel) in enumerate(shown, int(bool(maps))):
        axes = figure.add_subplot(grid[row, 0])
        draw_lines(axes, panel, noted, labels=row == int(bool(maps)))
        axes.set_title(short(kind + panel.title, 60), fontsize=BODY, loc="left", color=INK, pad=4)
    if shown:
        axes.set_xlabel("optimizer steps", fontsize=BODY, color=INK, labelpad=1)
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
        axes.set_title(cut(panel.title), fontsize=SMALL, loc="left", color=INK, pad=3)
        if column == 0:
            axes.text(
                0, 1.22, short(f"Attribution: {maps.title}", 60), fontsize=BODY, color=INK, transform=axes.transAxes
            )
