"""Several runs as one: their rows side by side, each with the label of its run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from tdhook_train.buffer import folder
from tdhook_train.buffer.artifact import Artifact
from tdhook_train.buffer.lock import WriterLock, lives
from tdhook_train.buffer.manifest import Manifest
from tdhook_train.buffer.schema import Schema
from tdhook_train.errors import RunExistsError, SchemaError, SettingsError

if TYPE_CHECKING:
    from tdhook_train.buffer.buffer import ArtifactBuffer
    from tdhook_train.buffer.run import Run

__all__ = ["appearing", "copy_rows", "labelled", "labels_of"]

_AT_ONCE = 256  # rows in memory


def labelled(runs: Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]]) -> dict[str, Path]:
    """Return the folders by label, the names of the folders where none are given.

    Raises:
        SettingsError: there is none, or two have the same label.
    """
    if isinstance(runs, (str, os.PathLike)):
        raise SettingsError(f"runs={runs!r} is one folder; give several, as a list or by label")
    given = runs.items() if isinstance(runs, Mapping) else ((Path(run).resolve().name, run) for run in runs)
    pairs = [(str(label), run) for label, run in given]
    if not pairs:
        raise SettingsError("there is no run to merge")
    by_label: dict[str, Path] = {}
    for label, run in pairs:
        if label in by_label:
            raise SettingsError(f"{by_label[label]} and {run} have the same label {label!r}; give a mapping of labels")
        by_label[label] = Path(run)
    return by_label


def labels_of(sources: Mapping[str, Run]) -> tuple[str, ...]:
    """Return the label of every run, of merged ones that of each inside."""
    labels = [
        each for label, run in sources.items() for each in ([f"{label}/{inner}" for inner in run.runs] or [label])
    ]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise SettingsError(f"two runs have the same label {twice[0]!r}; give a mapping of other labels")
    return tuple(labels)


@contextmanager
def appearing(into: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder to fill, which takes its place when the block ends well, and is deleted otherwise.

    Raises:
        RunExistsError: the place is taken by a run that is not to be overwritten, or by other files.
    """
    folder.check_free(into, allow_run=overwrite)
    before = Manifest.find(into) if folder.holds_run(into) else None
    if before is not None and (others := folder.others(into, before)):
        raise RunExistsError(f"{into} holds other files beside its run ({others[0]}); choose another folder")
    lock = WriterLock(into) if before is not None else None
    _sweep(into)
    partial = into.with_name(f".{into.name}.{os.getpid()}.partial")
    try:
        yield partial
        if before is not None:
            folder.delete_run(into, before)
        else:
            folder.check_free(into, allow_run=False)  # somebody may have begun a run there in the meantime
        if into.exists():
            shutil.rmtree(into)  # what is left is ours: a lock
        partial.replace(into)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.release()


def _sweep(into: Path) -> None:
    """Delete what processes that were killed left half-merged."""
    for left in into.parent.glob(f".{into.name}.*.partial"):
        process = left.name.split(".")[-2]
        if process.isdecimal() and not lives(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def copy_rows(sources: Mapping[str, Run], merged: ArtifactBuffer, *, progress: bool) -> None:
    """Copy all rows and events.

    Raises:
        SchemaError: an artifact differs between the runs; the message names them and what differs.
    """
    schemas: dict[str, tuple[str, Schema]] = {}
    total = sum(len(run[name]) for run in sources.values() for name in run)
    first = 0
    with tqdm(total=total, desc="merging", unit="row", disable=None if progress else True) as bar:
        for label, run in sources.items():
            for event in run.events():
                inner = f"{label}/{event['run']}" if run.runs and "run" in event else label
                merged.note(event.pop("kind"), **{**event, "run": inner})
            for name in run:
                _declare(merged, name, run[name].schema, label, schemas)
                _copy(run[name], merged, name, first, bar)
            first += max(1, len(run.runs))


def _declare(
    merged: ArtifactBuffer, name: str, schema: Schema, label: str, known: dict[str, tuple[str, Schema]]
) -> None:
    if name in known:
        other, first = known[name]
        try:
            first.check_same(schema)
        except SchemaError as error:
            raise SchemaError(f"{name!r} differs between runs {other!r} and {label!r}: {error}") from None
        return
    known[name] = (label, schema)
    merged.declare(
        name,
        dims={key: column.dims for key, column in schema.columns.items() if key[0] != "meta"},
        coords=schema.coords,
        settings=schema.settings,
        legend=schema.legend,
        files=schema.files,
    )


def _copy(source: Artifact, merged: ArtifactBuffer, name: str, first: int, bar: tqdm) -> None:
    for rows in source.in_parts(_AT_ONCE):
        # numbers that rows of a single run may hold say nothing here
        inner = rows["meta", "run"] if source.runs else torch.zeros(len(rows), dtype=torch.int64)
        rows["meta", "run"] = inner + first
        merged.extend(name, rows)
        bar.update(len(rows))
