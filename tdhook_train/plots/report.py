"""The report of one run, or of several."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import SettingsError
from tdhook_train.plots import png, provenance
from tdhook_train.plots.one_run import by_run
from tdhook_train.plots.onsets import main_onsets
from tdhook_train.plots.page import page
from tdhook_train.plots.sections import (
    ablation,
    attribution,
    cost,
    health,
    others,
    patching,
    probe,
    saliency,
    similarity,
)
from tdhook_train.plots.sections import training as curve
from tdhook_train.plots.sections.section import Section
from tdhook_train.plots.several import together
from tdhook_train.plots.source import marks

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["write_report"]

Run: TypeAlias = ArtifactBuffer | str | os.PathLike[str]


def write_report(
    buffer: Run | Sequence[Run] | Mapping[str, Run],
    out: str | os.PathLike[str],
    *,
    training: pd.DataFrame | Mapping[str, pd.DataFrame] | None = None,
    title: str = "What the networks learned, and when",
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Write ``report.html`` and ``report.png``: what a run's networks know, rest on and use, over training.

    Artifacts are found by their keys, whatever the run called them; a section without its artifact says so in one
    sentence. The page is one file that needs no network; its numbers stand in tables too, at some of the ticks. Of
    three runs or more, pictures show the mean, at the steps that all have, with its 95 % interval; of two, each.

    Args:
        buffer: the run, or its folder; or several, in a list or by label. A merged buffer is several.
        out: folder to write to; made where missing.
        training: the training curve: columns ``frames``, ``step``, ``return`` (NaN where no episode ended) and, for
            the observers' share, ``seconds`` and ``observer_seconds`` (both cumulative). Of several runs, by label.
        title: heading of the page and of the picture.
        facts: what else the header should say of the run, such as environment and seed.

    Returns:
        The path of the page.

    Raises:
        KeyMissingError: a buffer has no row.
        SettingsError: no run was given, two have one label, or a training curve is of none of them.
    """
    with ExitStack() as stack:
        runs = {
            inner: each
            for label, run in _labelled(buffer).items()
            for inner, each in by_run(_opened(run, stack), label).items()
        }
        curves = _curves(training, list(runs))
        header = _header(runs) | {name: str(fact) for name, fact in (facts or {}).items()}
        parts = {label: _sections(run, curves.get(label), facts or {}) for label, run in runs.items()}
        sections = next(iter(parts.values())) if len(parts) == 1 else together(parts)
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "report.html"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(page(title, header, sections))
        png.write(runs, folder / "report.png", training=curves, title=title)
        return path


def _opened(run: Run, stack: ExitStack) -> ArtifactBuffer:
    if isinstance(run, str | os.PathLike):
        return stack.enter_context(ArtifactBuffer.open(run, damaged="skip"))
    return run


def _labelled(given: Run | Sequence[Run] | Mapping[str, Run]) -> dict[str, Run]:
    """Return the runs by label: their folders' names where these differ, else their numbers."""
    if isinstance(given, ArtifactBuffer | str | os.PathLike):
        return {"run": given}
    if isinstance(given, Mapping):
        named = {str(label): run for label, run in given.items()}
    else:
        folders = [Path(run.path if isinstance(run, ArtifactBuffer) else run).resolve() for run in given]
        names = [folder.name for folder in folders]
        if len(set(names)) < len(names):
            names = [str(folder) for folder in folders]
        if len(set(names)) < len(names):
            raise SettingsError(f"{max(names, key=names.count)} was given twice; give a mapping of labels")
        named = dict(zip(names, given, strict=True))
    if not named:
        raise SettingsError("there is no run to report on")
    return named


def _curves(given: pd.DataFrame | Mapping[str, pd.DataFrame] | None, labels: list[str]) -> dict[str, pd.DataFrame]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if len(labels) > 1:
            raise SettingsError(f"training is one curve for {len(labels)} runs; give a mapping with their labels")
        return {labels[0]: given}
    if unknown := set(given) - set(labels):
        raise SettingsError(f"training has a curve of {sorted(unknown)[0]!r}; the runs are {', '.join(labels)}")
    return dict(given)


def _header(runs: Mapping[str, ArtifactBuffer]) -> dict[str, str]:
    found = {label: provenance.facts(run) for label, run in runs.items()}
    if len(found) == 1:
        return next(iter(found.values()))
    return {label: f"{fact['ticks']} ticks, steps {fact['optimizer steps']}" for label, fact in found.items()}


def _sections(buffer: ArtifactBuffer, training: pd.DataFrame | None, facts: Mapping[str, object]) -> list[Section]:
    noted = marks(buffer)
    found = [
        curve.section(training, noted, main_onsets(buffer)),
        probe.section(buffer, noted),
        attribution.section(buffer, noted),
        saliency.section(buffer),
        patching.section(buffer, noted),
        ablation.section(buffer, noted),
        similarity.section(buffer, noted),
        health.section(buffer, noted),
        others.section(buffer, noted),
        cost.section(buffer, training, noted),
        provenance.section(buffer, facts),
    ]
    return [section for section in found if section is not None]
