"""A run's folder of artifacts: every row that was acknowledged is there when it is opened again."""

from __future__ import annotations

import os
import time as clock
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from tensordict import TensorDictBase

from tdhook_train.buffer import events, folder
from tdhook_train.buffer.artifact import Artifact
from tdhook_train.buffer.lock import WriterLock
from tdhook_train.buffer.manifest import Entry, Manifest
from tdhook_train.buffer.row import RowMeta, flatten
from tdhook_train.buffer.run import Run
from tdhook_train.buffer.schema import Declaration, Label, Schema
from tdhook_train.buffer.storage import GrowingMemmapStorage
from tdhook_train.errors import ClosedError, SettingsError

__all__ = ["ArtifactBuffer"]

_WRITERS: WeakValueDictionary[str, ArtifactBuffer] = WeakValueDictionary()


class ArtifactBuffer(Run):
    """The artifacts of a run, each a replay buffer in a sub-folder of its own.

    Args:
        path: the run's folder; made where there is none.
        resume: go on with the run that the folder holds, if it holds one.
        overwrite: delete the run that the folder holds, if it holds one; files of others stay.
        seed: of the generators that samplers draw from.

    Raises:
        RunExistsError: the folder holds a run and neither option was given, or it holds other files.
        SettingsError: both options were given.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False, seed: int = 0
    ) -> None:
        if resume and overwrite:
            raise SettingsError("resume=True and overwrite=True were given; choose one")
        self._begin(Path(path), "a", seed)
        folder.check_free(self.path, allow_run=resume or overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_over(overwrite)

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: Literal["r", "a"] = "r", *, seed: int = 0) -> ArtifactBuffer:
        """Open a run that is there, to read it (also while another process writes) or to go on writing.

        Raises:
            KeyMissingError: there is no run; the message names the runs near by.
        """
        if mode not in ("r", "a"):
            raise SettingsError(f"mode={mode!r} is neither 'r' nor 'a'")
        folder.check_run(Path(path))
        buffer = cls.__new__(cls)
        buffer._begin(Path(path), mode, seed)
        if mode == "a":
            buffer._take_over(overwrite=False)
        else:
            buffer._refresh()
        return buffer

    def _take_over(self, overwrite: bool) -> None:
        where = str(self.path.resolve())
        if (before := _WRITERS.get(where)) is not None:
            before.close()  # of one process, the writer opened last goes on, as in a notebook cell that is run again
        self._lock = WriterLock(self.path)
        try:
            self._start(overwrite)
        except BaseException:
            self._lock.release()
            raise
        _WRITERS[where] = self

    def _start(self, overwrite: bool) -> None:
        found = Manifest.read(self.path) if folder.holds_run(self.path) else None
        if found is not None and overwrite:
            folder.delete_run(self.path, found)
            found = None
        if found is not None:
            self._manifest = replace(found, attempt=found.attempt + 1)
            folder.sweep(self.path, found)
        self._manifest.write(self.path)
        events.mend(self.path)

    # --- writing

    def declare(
        self,
        name: str,
        *,
        dims: Mapping[Any, Iterable[str] | str],
        coords: Mapping[str, Iterable[Label]] | None = None,
        settings: Any = None,
        legend: Mapping[Any, Mapping[int, str]] | None = None,
    ) -> None:
        """Say what describes an artifact, before its first row.

        Args:
            name: letters, digits, ``_``, ``-`` and ``.``.
            dims: names of each key's dimensions; a last name ``"*x"`` stands for all that remain.
            coords: labels of a dimension.
            settings: what the artifact is made with, as JSON.
            legend: what the codes of a key mean.

        Raises:
            SchemaError: rows are stored under another declaration; the message names what differs.
        """
        self._check_open()
        self._check_artifact_name(name)
        declared = Declaration.of(dims, coords, settings, legend)
        if (entry := self._manifest.artifacts.get(name)) is not None:
            entry.schema.check_declaration(declared, of=name)
        self._declared[name] = declared

    def append(  # noqa: PLR0913 - what describes a row is many numbers
        self,
        name: str,
        artifacts: TensorDictBase | Mapping[Any, Any],
        *,
        step: int,
        frames: int = 0,
        epoch: int = 0,
        weights: int = 0,
        data: int = 0,
        cost: float = 0.0,
        time: float | None = None,
        attempt: int | None = None,
    ) -> int:
        """Commit one row and return its position when it is committed.

        Args:
            name: of the artifact.
            artifacts: a TensorDict or nested mapping, stored as one row whatever its batch size.
            step: optimizer steps behind the weights that were measured.
            frames: environment frames, or samples, seen so far.
            epoch: passes over the data so far.
            weights: 64-bit fingerprint of the weights.
            data: 64-bit fingerprint of the batch.
            cost: seconds that the measurement took.
            time: Unix seconds; now, if None.
            attempt: that of this writer, if None.

        Raises:
            SchemaError: the row differs from the first one, or from what was declared; nothing is written.
            ClosedError: the buffer is closed or was opened for reading.
        """
        self._check_open()
        time = clock.time() if time is None else time
        attempt = self.attempt if attempt is None else attempt
        meta = RowMeta(step, frames, epoch, weights, data, attempt, time, cost).row()
        row = flatten(artifacts)
        artifact = self._artifacts[name] if name in self._artifacts else self._for_writing(name, row)
        return artifact.append_row({**row, **meta})

    def _for_writing(self, name: str, row: dict[tuple[str, ...], torch.Tensor]) -> Artifact:
        if name in self._manifest.artifacts:
            return self[name]
        self._check_artifact_name(name)
        declared = self._declared.setdefault(name, Declaration())
        entry = Entry(Schema.of(row, declared))
        artifact = self._open_artifact(name, entry, "w")
        # the files first: a reader that finds the name in the manifest finds them too
        self._write_manifest(self._manifest.with_entry(name, entry, list(self._declared)))
        self._artifacts[name] = artifact
        return artifact

    def _write_manifest(self, manifest: Manifest) -> None:
        manifest.write(self.path)
        self._manifest = manifest

    def truncate(self, after_step: int) -> None:
        """Drop the rows with ``step > after_step`` from all artifacts, as resuming from a checkpoint needs.

        Rows written in step order are cut from the end. Otherwise the rows to keep are written to new files, which
        then take the place of the old ones: a kill in between leaves all rows.
        """
        self._check_open()
        for name in self:
            storage = self[name].storage
            keep = storage.column(("meta", "step")) <= after_step
            kept = int(keep.sum())
            if bool(keep[:kept].all()):
                storage.cut(kept)
            else:
                self._rewrite(name, storage, keep.nonzero()[:, 0])

    def _rewrite(self, name: str, storage: GrowingMemmapStorage, keep: torch.Tensor) -> None:
        entry = replace(self._manifest.artifacts[name], generation=storage.generation + 1)
        copy = GrowingMemmapStorage(storage.folder, entry.schema, mode="w", name=name, generation=entry.generation)
        copy.extend(storage.rows(keep))
        copy.flush()
        try:
            self._write_manifest(self._manifest.with_entry(name, entry, list(self._declared)))
        finally:
            # a reader may be opening the old files, so they go when the run is next opened for writing
            storage.attach_files(self._manifest.artifacts[name].generation)

    def note(self, kind: str, **fields: Any) -> None:
        """Record something that happened, as one line of ``events.jsonl``."""
        self._check_open()
        events.write(self.path, {"kind": kind, "time": clock.time(), **fields})

    def folder(self, name: str) -> Path:
        """Return a sub-folder for other files of the run; overwriting the run deletes it."""
        folder.check_name(name)
        if name in self._manifest.artifacts or name in self._declared:
            raise SettingsError(f"{name!r} is the folder of an artifact; choose another name")
        if self._mode == "a" and not self._closed and name not in self._manifest.folders:
            self._write_manifest(replace(self._manifest, folders=(*self._manifest.folders, name)))
            (self.path / name).mkdir(exist_ok=True)
        return self.path / name

    # --- the end

    def flush(self) -> None:
        """Wait until every committed row is on the disk, where it outlasts a power cut as well."""
        if self._mode == "a":
            for artifact in self._artifacts.values():
                artifact.storage.flush()

    def close(self) -> None:
        """Flush, and let others write; rows can still be read. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            if os.getpid() == self._process:
                self.flush()
        finally:
            for artifact in self._artifacts.values():
                artifact.storage.writable = False
            if self._lock is not None:
                self._lock.release()

    def _check_artifact_name(self, name: str) -> None:
        folder.check_name(name)
        if name in self._manifest.folders:
            raise SettingsError(f"{name!r} is a folder for other files; choose another name for the artifact")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(
                f"{self.path} is closed; open it again with ArtifactBuffer({str(self.path)!r}, resume=True)"
            )
        if self._mode == "r":
            raise ClosedError(f"{self.path} was opened for reading; open it with mode='a' to write")
        if os.getpid() != self._process:
            raise ClosedError(f"{self.path} is written by process {self._process}, of which this one is a copy")

    def __enter__(self) -> ArtifactBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
