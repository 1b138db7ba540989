"""How the training itself went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.charts import LineChart
from tdhook_train.plots.onsets import Onset
from tdhook_train.plots.panels import Line, LinePanel, Mark
from tdhook_train.plots.sections.section import Picture, Section
from tdhook_train.plots.style import FAINT, PALETTE

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["frames_at", "panel", "section"]

_SMOOTHED_FROM = 40  # batches; with fewer the curve itself is readable


def panel(training: pd.DataFrame) -> LinePanel:
    """Return the mean return of the episodes that ended in each batch, over environment frames."""
    curve = training[["frames", "return"]].dropna()
    frames, returns = curve["frames"].to_numpy(), curve["return"].to_numpy(dtype=np.float64)
    if len(curve) < _SMOOTHED_FROM:
        drawn: tuple[Line, ...] = (Line("mean return of a batch", frames, returns, PALETTE[0]),)
    else:
        smooth = curve["return"].rolling(window(len(curve)), min_periods=1, center=True).mean().to_numpy()
        drawn = (
            Line("mean return of a batch", frames, returns, FAINT),
            Line(f"running mean over {window(len(curve))} batches", frames, smooth, PALETTE[0]),
        )
    return LinePanel("", "return per episode", drawn, x="frames", floor="data")


def window(batches: int) -> int:
    """Return over how many batches the running mean goes: about a twentieth of the run, an odd number."""
    return 2 * (batches // 40) + 1


def frames_at(training: pd.DataFrame, steps: Sequence[float]) -> list[float]:
    """Return the environment frames at the given optimizer steps, interpolated between batches."""
    if not steps:
        return []
    known = training[["step", "frames"]].dropna().sort_values("step")
    return np.interp(steps, known["step"], known["frames"]).tolist() if len(known) else [float("nan")] * len(steps)


def section(training: pd.DataFrame | None, marks: Sequence[Mark], onsets: Sequence[Onset] = ()) -> Section:
    """Show the return over frames, and on it when each target came to be known."""
    title = "What the agent earned"
    if training is None or training.get("return") is None or training["return"].notna().sum() == 0:
        return Section(title, missing="No training curve was given, or no episode ended during the run.")
    whole = panel(training)
    known = _onset_lines(training, whole.lines[-1], onsets)
    caption = (
        "Undiscounted return of the episodes that ended in each batch, as the behaviour policy, noise included, "
        "earned it. A batch in which no episode ended has no point. "
        "The pictures below count optimizer steps, not frames."
    )
    if known:
        caption += " A diamond stands where a target was half learned, in the layer where its score rose most."
    at = frames_at(training, [mark.step for mark in marks])
    chart = LineChart([replace(whole, lines=(*whole.lines, *known))], marks=marks, at=at)
    return Section(title, (Picture("Return over training", caption, chart),))


def _onset_lines(training: pd.DataFrame, curve: Line, onsets: Sequence[Onset]) -> list[Line]:
    """Return a line of one point for each onset, on the curve."""
    places = frames_at(training, [onset.step for onset in onsets])
    return [
        Line(
            name=f"“{onset.target}” half learned",
            x=np.array([frames]),
            y=np.interp([frames], np.asarray(curve.x, dtype=np.float64), curve.y),
            color=PALETTE[number % len(PALETTE)],
            weight="markers",
            hover={"step": np.array([onset.step])},
        )
        for number, (onset, frames) in enumerate(zip(onsets, places, strict=True), 1)
    ]
