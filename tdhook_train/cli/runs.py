"""Which run a path on the command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from tdhook_train.buffer import ArtifactBuffer

__all__ = ["RUN", "Run", "folder_of", "labels_of", "opened"]

RUN = "Folder of a run: what the observer was given as into=, or the folder around it."
Run: TypeAlias = Annotated[Path, typer.Argument(metavar="RUN", help=RUN, show_default=False)]


def folder_of(run: Path) -> Path:
    """Return the folder of artifacts: the one given, or the only one that lies in it.

    Raises:
        KeyMissingError: there is none, or several; the message names the runs near by.
    """
    from tdhook_train.buffer.folder import check_run, holds_run

    if run.is_dir() and not holds_run(run):
        inside = [folder for folder in run.iterdir() if folder.is_dir() and holds_run(folder)]
        if len(inside) == 1:
            return inside[0]
    check_run(run)
    return run


def opened(run: Path) -> ArtifactBuffer:
    """Open a run for reading, also while it is written; what is damaged is left out, with a warning."""
    from tdhook_train.buffer import ArtifactBuffer

    return ArtifactBuffer.open(folder_of(run), damaged="skip")


def labels_of(runs: Sequence[Path]) -> list[str]:
    """Return a label for each run: the names of the folders, or their paths where two have one name."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]
