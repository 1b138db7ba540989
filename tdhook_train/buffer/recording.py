"""A run that is being written: what is declared of its artifacts, and their rows."""

from __future__ import annotations

import os
import time as clock
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor

from tdhook_train.buffer import events, folder
from tdhook_train.buffer.column_file import sync
from tdhook_train.buffer.declaration import Declaration, Label
from tdhook_train.buffer.entry import Entry
from tdhook_train.buffer.flusher import Flusher
from tdhook_train.buffer.manifest import Manifest, write_schema
from tdhook_train.buffer.retention import Keep
from tdhook_train.buffer.row import META, Key, RowMeta, Value, flatten, with_meta
from tdhook_train.buffer.row_writer import RowWriter
from tdhook_train.buffer.run import Run
from tdhook_train.buffer.schema import Schema
from tdhook_train.errors import ClosedError, SchemaError, SettingsError

__all__ = ["Recording"]

_CHECKED_BYTES = 10**6  # rows below this size have checksums, unless declared otherwise


class Recording(Run):
    """What can be written of a run."""

    _flusher: Flusher

    def declare(  # noqa: PLR0913 - everything that describes an artifact
        self,
        name: str,
        *,
        dims: Mapping[Any, Iterable[str] | str] | None = None,
        coords: Mapping[str, Iterable[Label]] | None = None,
        settings: Any = None,
        legend: Mapping[Any, Mapping[int, str]] | None = None,
        files: Iterable[str | tuple[str, ...]] = (),
        capacity: int | None = None,
        max_bytes: int | None = None,
        keep: Keep | None = None,
        checksums: bool | None = None,
    ) -> None:
        """Say what describes an artifact, before its first row.

        Args:
            name: letters, digits, ``_``, ``-`` and ``.``.
            dims: names of each key's dimensions; a last name ``"*x"`` stands for all that remain.
            coords: labels of a dimension.
            settings: what the artifact is made with, as JSON.
            legend: what the codes of a key mean.
            files: keys whose values differ in shape from row to row (a fitted dictionary), tensors or nested
                TensorDicts, each kept in a file of its own. Keys that hold bytes (a figure) are kept so in any case.
            capacity: how many rows there may be. Of this and the next two, what is not given is as it was stored, or as
                the run has it; of an artifact that has rows, all three can be changed.
            max_bytes: how many bytes they may take up on the disk. Where rows were stored before, a smaller limit drops
                rows, but frees no disk: the files of columns never shrink, since others may have mapped them.
            keep: which rows stay, as for the run.
            checksums: whether values are stored with a CRC-32 each; None does so for rows under 1 MB.

        Raises:
            SchemaError: rows are stored under another declaration; the message names what differs.
        """
        self._check_open()
        self._check_artifact_name(name)
        declared = Declaration.of(dims or {}, coords, settings, legend, files)
        entry = self._manifest.artifacts.get(name)
        if entry is not None:
            given = {"coords": coords, "settings": settings, "legend": legend}
            entry.schema.check_declaration(declared, [w for w, value in given.items() if value is not None], of=name)
        limited = (capacity, max_bytes, keep) != (None, None, None)
        before = (entry and entry.retention) or self._manifest.retention
        retention = before.changed(capacity, max_bytes, keep) if limited else None
        self._declared[name] = replace(declared, retention=retention, checksums=checksums)
        if entry is not None and retention not in (None, entry.retention):
            entry = replace(entry, retention=retention)
            retention.check(entry.schema.columns, name)
            self[name].storage.limit(entry)
            self._write_entry(name, entry)

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
        run: int = 0,
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
            run: which of several merged runs it comes from.

        Returns:
            The position among all rows in the order of writing; -1 where retention keeps others instead.

        Raises:
            SchemaError: the row differs from the first one, or from what was declared; nothing is written.
            DiskError: there is no room; nothing stored is lost.
            ClosedError: the buffer is closed or was opened for reading.
        """
        self._check_open()
        time = clock.time() if time is None else time
        attempt = self.attempt if attempt is None else attempt
        meta = RowMeta(step, frames, epoch, weights, data, attempt, run, time, cost)
        row = flatten(artifacts, self._files_of(name))
        if name not in self._artifacts:
            meta.numbers()  # before anything is begun
            self._for_writing(name, row)
        position = self._artifacts[name].append_row(row, meta)
        self._flusher.touch()
        return position

    def extend(self, name: str, artifacts: TensorDictBase, *, step: int | None = None, **meta: float) -> Tensor:
        """Commit many rows, batch first, and return the positions of those that are kept: activations, say.

        Args:
            name: of the artifact.
            artifacts: a TensorDict; each element along its first batch dimension is a row.
            step: optimizer steps behind the weights that were measured; None if the rows hold their ``meta``.
            meta: what else describes the rows, as for :meth:`append`.

        Raises:
            SchemaError: the rows differ from the schema; none is written.
            DiskError: there is no room; nothing stored is lost.
        """
        self._check_open()
        if not is_tensor_collection(artifacts) or not artifacts.batch_dims:
            raise SchemaError(f"{name}: expected a TensorDict with a batch dimension, got {type(artifacts).__name__}")
        rows = artifacts.copy()
        rows.batch_size = rows.batch_size[:1]
        for key, number in RowMeta.given(meta if step is None else {"step": step, **meta}).items():
            rows[key] = torch.full(rows.batch_size, number, dtype=META[key], device="cpu")
        rows = with_meta(rows, name, self.attempt)
        if name not in self._artifacts:
            if not len(rows):
                return torch.empty(0, dtype=torch.int64, device="cpu")
            self._for_writing(name, flatten(rows[0].exclude("meta"), self._files_of(name)))
        positions = self._artifacts[name].extend_rows(rows)
        self._flusher.touch()
        return positions

    def _files_of(self, name: str) -> tuple[Key, ...]:
        if (entry := self._manifest.artifacts.get(name)) is not None:
            return entry.schema.files
        return self._declared[name].files if name in self._declared else ()

    def _for_writing(self, name: str, row: Mapping[Key, Value]) -> None:
        if name in self._manifest.artifacts:
            self._artifacts[name] = self[name]
            return
        self._check_artifact_name(name)
        declared = self._declared.setdefault(name, Declaration())
        schema = Schema.of(row, declared)
        small = schema.row_bytes < _CHECKED_BYTES
        entry = Entry(schema, declared.retention, small if declared.checksums is None else declared.checksums)
        (declared.retention or self._manifest.retention).check(schema.columns, name)
        limited = self._limited(entry)
        rows = RowWriter(self.path / name, limited, mode="w", attempt=self.attempt, damaged=self._damaged)
        # the files first: a reader that finds the name in the manifest finds them too
        self._write_entry(name, entry)
        self._artifacts[name] = self._artifact(name, rows)

    def _write_entry(self, name: str, entry: Entry) -> None:
        write_schema(self.path / name, entry)
        self._write_manifest(self._manifest.with_entry(name, entry, list(self._declared)))

    def _write_manifest(self, manifest: Manifest) -> None:
        manifest.write(self.path)
        self._manifest = manifest

    def truncate(self, after_step: int) -> None:
        """Drop the rows with ``step > after_step`` from all artifacts, as resuming from a checkpoint needs."""
        self._check_open()
        for name in self:
            storage = self[name].storage
            steps, _ = storage.disk.column(("meta", "step"), *storage.disk.index())
            storage.drop((steps > after_step).nonzero()[:, 0].tolist())

    def drop(self, name: str, steps: Iterable[int]) -> None:
        """Drop the rows of these steps from one artifact, as measuring them again needs."""
        self._check_open()
        if gone := set(steps):
            storage = self[name].storage
            held, _ = storage.disk.column(("meta", "step"), *storage.disk.index())
            storage.drop([place for place, step in enumerate(held.tolist()) if step in gone])

    def note(self, kind: str, **fields: Any) -> None:
        """Record something that happened, as one line of ``events.jsonl``."""
        self._check_open()
        events.write(self.path, {"kind": kind, "time": clock.time(), **fields})

    def folder(self, name: str) -> Path:
        """Return a sub-folder for other files of the run; overwriting the run deletes it."""
        folder.check_name(name)
        if name in self._manifest.artifacts or name in self._declared:
            raise SettingsError(f"{name!r} is the folder of an artifact; choose another name")
        here = self._mode == "a" and not self._closed and os.getpid() == self._process
        if here and name not in self._manifest.folders:
            self._write_manifest(replace(self._manifest, folders=(*self._manifest.folders, name)))
            (self.path / name).mkdir(exist_ok=True)
        return self.path / name

    def flush(self) -> None:
        """Wait until every committed row is on the disk, where it outlasts a power cut as well."""
        if self._mode == "a":
            for artifact in list(self._artifacts.values()):
                artifact.storage.disk.sync()
            sync(self.path / events.EVENTS)
            sync(self.path)

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
