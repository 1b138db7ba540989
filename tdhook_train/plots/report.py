"""The report of one run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import KeyMissingError
from tdhook_train.plots import png
from tdhook_train.plots.page import page
from tdhook_train.plots.sections import ablation, attribution, cost, health, patching, probe, saliency
from tdhook_train.plots.sections import training as curve
from tdhook_train.plots.source import marks, read, recorded

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["write_report"]


def write_report(
    buffer: ArtifactBuffer | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    training: pd.DataFrame | None = None,
    title: str = "What the networks learned, and when",
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Write ``report.html`` and ``report.png``: what a run's networks know, rest on and use, over training.

    Artifacts are found by their keys, whatever the run called them; a section without its artifact says so in one
    sentence. The page is one file that needs no network.

    Args:
        buffer: the run, or its folder.
        out: folder to write to; made where missing.
        training: the training curve: columns ``frames``, ``step``, ``return`` (NaN where no episode ended) and, for
            the observers' share, ``seconds`` and ``observer_seconds`` (both cumulative).
        title: heading of the page and of the picture.
        facts: what else the header should say of the run, such as environment and seed.

    Returns:
        The path of the page.

    Raises:
        KeyMissingError: the buffer has no row.
    """
    if isinstance(buffer, str | os.PathLike):
        with ArtifactBuffer.open(buffer, damaged="skip") as opened:
            return write_report(opened, out, training=training, title=title, facts=facts)
    header = _facts(buffer)
    noted = marks(buffer)
    looks = saliency.section(buffer)
    sections = (
        curve.section(training, noted),
        probe.section(buffer, noted),
        attribution.section(buffer, noted),
        *(() if looks is None else (looks,)),
        patching.section(buffer, noted),
        *([played] if (played := ablation.section(buffer, noted)) else []),
        health.section(buffer, noted),
        cost.section(buffer, training, noted),
    )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: _settings(artifact) for name, artifact in recorded(buffer)}
    header |= {name: str(fact) for name, fact in (facts or {}).items()}
    path = folder / "report.html"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(page(title, header, settings, sections))
    png.write(buffer, folder / "report.png", training=training, title=title)
    return path


def _facts(buffer: ArtifactBuffer) -> dict[str, str]:
    """Return the run's path, extent and date for the header."""
    rows = [artifact for _, artifact in recorded(buffer)]
    if not rows:
        known = ", ".join(repr(name) for name in buffer) or "none"
        raise KeyMissingError(f"{buffer.path} holds no row to report on; artifacts declared: {known}")
    meta = {key: [read(artifact, ("meta", key)) for artifact in rows] for key in ("step", "frames", "time")}
    steps = sorted({int(step) for table in meta["step"] for step in table.steps})
    frames = max(int(table.values.max()) for table in meta["frames"])
    first, last = (pick(float(pick(table.values)) for table in meta["time"]) for pick in (min, max))
    return {
        "run": str(buffer.path),
        "ticks": str(len(steps)),
        "optimizer steps": f"{steps[0]:,} to {steps[-1]:,}",
        "environment frames": f"{frames:,}",
        "measured": f"{datetime.fromtimestamp(first, UTC):%Y-%m-%d %H:%M} UTC, within {_duration(last - first)}",
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _settings(artifact: Any) -> object:
    return getattr(artifact, "settings", None) or {}
