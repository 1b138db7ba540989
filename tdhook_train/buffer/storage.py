"""A TorchRL storage of one file a key that grows in place and keeps every committed row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import LazyMemmapStorage

from tdhook_train.buffer.entry import Entry
from tdhook_train.buffer.row import META, Key, as_key, flatten
from tdhook_train.buffer.row_writer import MAX_ROWS, RowWriter
from tdhook_train.buffer.rows import Rows
from tdhook_train.buffer.schema import Schema
from tdhook_train.errors import ClosedError, SettingsError

__all__ = ["GrowingMemmapStorage"]


class GrowingMemmapStorage(LazyMemmapStorage):
    """Rows on disk, as samplers, transforms and replay buffers of TorchRL see them.

    Positions count the rows in the order in which they were written.

    Args:
        rows: what is read and written.
    """

    supports_conditional_update = False  # rows are written once

    def __init__(self, rows: Rows) -> None:
        # compilable=True keeps the counters plain: shared ones start a resource tracker process
        super().__init__(MAX_ROWS, scratch_dir=rows.folder, compilable=True)
        self._revision = 0
        self.disk = rows
        self.writable = rows.writable
        self.initialized = True
        self._follow()

    @property
    def name(self) -> str:
        """The artifact's name, for messages."""
        return self.disk.name

    @property
    def schema(self) -> Schema:
        """What every row looks like."""
        return self.disk.entry.schema

    def _follow(self) -> None:
        if getattr(self, "_capacity", None) != self.disk.capacity:
            self._storage = self.disk.views()
            self._capacity = self.disk.capacity
        self._len = len(self.disk)
        self._bump_mutation_revision()

    def refresh(self) -> None:
        """Take in what another process has written since; nothing to do for a writer."""
        with self.disk.lock:
            if not self.writable and self.disk.refresh():
                self._follow()

    # --- writing

    def append(self, row: Mapping[Key, Any], meta: Sequence[float]) -> int:
        """Commit one row, its meta in the order of ``META``, and return its position, -1 where others are kept.

        Raises:
            SchemaError: the row differs from the schema; nothing is written.
            ClosedError: opened for reading.
            DiskError: the disk is full; nothing is lost, and the next append tries again.
        """
        self.schema.check(row, of=self.name, meta=False)
        with self._writing() as writer:
            return writer.append(row, meta)

    def extend(self, rows: TensorDictBase) -> Tensor:
        """Commit several rows with their meta, batch first; a kill keeps the leading ones.

        Returns:
            The positions of those that are kept, int64.

        Raises:
            SchemaError: the rows differ from the schema; none is written.
        """
        if files := self.schema.files:
            apart = [_apart(row, files) for row in rows.unbind(0)]
            for row, _ in apart:  # all are refused, or none
                self.schema.check(row, of=self.name, meta=False)
            with self._writing() as writer:
                first = writer.next_word
                for row, meta in apart:
                    writer.append(row, meta)
                positions = writer.numbers_since(first)
        else:
            values = {as_key(key): value for key, value in rows.items(include_nested=True, leaves_only=True)}
            self.schema.check(values, of=self.name, batched=True)
            with self._writing() as writer:
                positions = writer.extend(values, rows.batch_size[0])
        return torch.tensor(positions, dtype=torch.int64, device="cpu")

    @contextmanager
    def _writing(self) -> Iterator[RowWriter]:
        writer = self._writer()
        with self.disk.lock:
            try:
                yield writer
            finally:
                self._follow()

    def _writer(self) -> RowWriter:
        if not (self.writable and isinstance(self.disk, RowWriter)):
            raise ClosedError(f"{self.name!r} was opened for reading; open it with mode='a' to write")
        if self.disk.process != os.getpid():
            raise ClosedError(f"{self.disk.folder} is written by process {self.disk.process}, of which this is a copy")
        return self.disk

    def drop(self, positions: Sequence[int]) -> None:
        """Drop rows, given in ascending order; their places are taken by later ones."""
        with self._writing() as writer:
            writer.drop(positions)

    def limit(self, entry: Entry) -> None:
        """Keep as many rows as the entry says, from now on."""
        with self._writing() as writer:
            writer.limit(entry)

    # --- reading

    def get(self, index: Any) -> Any:
        """Return rows by position: views of the files for a slice, which no checksum is looked at for, else copies.

        Raises:
            DamagedError: something of that is damaged.
        """
        disk = self.disk
        with disk.lock:
            if disk.dense and not self.schema.files and (disk.own or isinstance(index, slice)):
                return super().get(index)
            positions = _positions(index, self._len)
            for _ in range(3):
                if len(positions.reshape(-1)) and int(positions.max()) >= len(disk):
                    break
                places = disk.places(positions.reshape(-1))
                rows = disk.table(places, disk.words(places))
                if len(rows) == len(places):
                    return rows[0] if not positions.ndim else rows
                self.refresh()  # some were replaced by later rows while they were read: take those
        raise IndexError(f"rows of {self.name!r} were dropped while they were read; the newest are being replaced")

    # --- what TorchRL calls

    @property
    def _mutation_revision(self) -> int:
        return self._revision

    def _bump_mutation_revision(self) -> None:
        # TorchRL's own is a tensor, which made in inference mode could not be changed outside of it
        self._revision += 1

    def set(self, cursor: int | Sequence[int] | slice, data: Any, *, set_cursor: bool = True) -> None:  # noqa: ARG002
        """Append, where ``cursor`` stands right behind the last row.

        Raises:
            SettingsError: ``cursor`` stands elsewhere; rows are written once.
        """
        rows = data.unsqueeze(0) if isinstance(cursor, int) else data
        if isinstance(cursor, slice):
            places = list(range(*cursor.indices(self.max_size)))
        else:
            places = torch.as_tensor(cursor, device="cpu").reshape(-1).tolist()
        if places != list(range(self._len, self._len + len(rows))):
            raise SettingsError(f"rows of {self.name!r} are written once, one after another; use extend")
        self.extend(rows)

    @property
    def shape(self) -> torch.Size:
        """Shape of what is stored so far."""
        return torch.Size([self._len])

    def _empty(self) -> None:
        self.drop(range(self._len))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: ARG002
        """Refuse: the rows are in the files already."""
        raise SettingsError(
            f"rows of {self.name!r} live in {self.disk.folder}; open the run instead of loading a state"
        )


def _apart(row: TensorDictBase, files: Sequence[Key]) -> tuple[dict[Key, Any], list[float]]:
    meta = [row[key].item() for key in META]
    return flatten(row.exclude("meta"), files), meta


def _positions(index: Any, length: int) -> Tensor:
    if isinstance(index, Tensor) and index.ndim == 1 and not index.is_floating_point() and index.dtype != torch.bool:
        if index.numel() and not -length <= int(index.min()) <= int(index.max()) < length:
            raise IndexError(f"positions {int(index.min())} to {int(index.max())} of {length} rows")
        return torch.where(index < 0, index + length, index).to(torch.int64)
    return torch.arange(length, device="cpu")[index]
