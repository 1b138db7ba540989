"""What observing cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.charts import LineChart
from tdhook_train.plots.panels import Line, LinePanel, Mark
from tdhook_train.plots.sections.section import Picture, Section
from tdhook_train.plots.sections.training import frames_at
from tdhook_train.plots.source import read, recorded
from tdhook_train.plots.style import PALETTE

if TYPE_CHECKING:
    import pandas as pd

    from tdhook_train.buffer import ArtifactBuffer

__all__ = ["section"]

_TITLE = "What observing cost"


def section(buffer: ArtifactBuffer, training: pd.DataFrame | None, marks: Sequence[Mark]) -> Section:
    """Show the time each method took per tick, and the observers' share of wall time."""
    pictures = [_per_tick(buffer, marks)]
    if training is not None and {"observer_seconds", "seconds", "frames"} <= set(training.columns):
        pictures.append(_share(training, marks))
    return Section(_TITLE, tuple(pictures))


def _per_tick(buffer: ArtifactBuffer, marks: Sequence[Mark]) -> Picture:
    costs = {name: read(artifact, ("meta", "cost")) for name, artifact in recorded(buffer)}
    steps = np.unique(np.concatenate([table.steps for table in costs.values()]))
    drawn = []
    for (name, table), color in zip(costs.items(), _cycle(len(costs)), strict=True):
        spent = np.zeros(len(steps))  # a method that was not due at a step took no time there
        spent[np.searchsorted(steps, table.steps)] = 1e3 * np.nan_to_num(table.values)
        drawn.append(Line(name, steps, spent, color))
    total = sum(float(np.nansum(table.values)) for table in costs.values())
    caption = (
        "Milliseconds each method took at each tick, one on top of the other, its share of the pass that all read "
        "from included. The first tick also pays for what is done once, such as baselines."
    )
    note = f"{total:.2f} s over {len(steps)} ticks in all."
    spent = np.sum([line.y for line in drawn], axis=0)
    usual, most = 1.5 * float(np.quantile(spent, 0.9)), float(spent.max())
    cut = most > 2 * usual > 0
    if cut:
        note += f" The dearest tick, at step {steps[spent.argmax()]:,}, took {most:.0f} ms and leaves the picture."
    limits = (0.0, usual) if cut else None
    panel = LinePanel("", "milliseconds per tick", tuple(drawn), kind="stacked", limits=limits)
    return Picture("Time per tick and method", caption, LineChart([panel], marks=marks), note)


def _cycle(count: int) -> list[str]:
    return [PALETTE[place % len(PALETTE)] for place in range(count)]


def _share(training: pd.DataFrame, marks: Sequence[Mark]) -> Picture:
    seconds = training["seconds"].to_numpy(dtype=np.float64)
    spent = training["observer_seconds"].to_numpy(dtype=np.float64)
    share = np.divide(100 * spent, seconds, out=np.full_like(seconds, np.nan), where=seconds > 0)
    line = Line("observers", training["frames"].to_numpy(), share, PALETTE[0])
    caption = (
        "Seconds spent in observers as a share of all wall time up to that frame. Ticks are dense at the start, so the "
        "share falls as training goes on; the last point is the price of the whole run."
    )
    panel = LinePanel("", "% of wall time so far", (line,), x="frames")
    chart = LineChart([panel], marks=marks, at=frames_at(training, [mark.step for mark in marks]))
    return Picture("Observers' share of wall time", caption, chart)
