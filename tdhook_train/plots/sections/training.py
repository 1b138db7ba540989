"""How the training itself went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.lines import lines
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


def frames_at(training: pd.DataFrame, steps: Sequence[int]) -> list[float]:
    """Return the environment frames at the given optimizer steps, interpolated between batches."""
    if not steps:
        return []
    known = training[["step", "frames"]].dropna().sort_values("step")
    return np.interp(steps, known["step"], known["frames"]).tolist() if len(known) else [float("nan")] * len(steps)


def section(training: pd.DataFrame | None, marks: Sequence[Mark]) -> Section:
    """Show the return over frames."""
    title = "What the agent earned"
    if training is None or training.get("return") is None or training["return"].notna().sum() == 0:
        return Section(title, missing="No training curve was given, or no episode ended during the run.")
    figure = lines([panel(training)], marks=marks, at=frames_at(training, [mark.step for mark in marks]))
    caption = (
        "Undiscounted return of the episodes that ended in each batch, as the behaviour policy, noise included, "
        "earned it. A batch in which no episode ended has no point. "
        "The pictures below count optimizer steps, not frames."
    )
    return Section(title, (Picture("Return over training", caption, figure),))
