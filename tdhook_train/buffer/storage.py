"""A TorchRL storage of one file a key that grows in place and keeps every committed row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyMemmapStorage

from tdhook_train.buffer.column_file import ColumnFile, file_name
from tdhook_train.buffer.row import Key, Row, as_key, key_name
from tdhook_train.buffer.schema import Schema
from tdhook_train.errors import ClosedError, KeyMissingError, SchemaError, SettingsError, did_you_mean

__all__ = ["GrowingMemmapStorage"]

_MAX_ROWS = 2**31 - 1  # samplers draw int32 positions
_FIRST_BYTES = 2**18  # room at first, in bytes and in rows, whichever is less
_FIRST_ROWS = 256
_GROWTH_BYTES = 2**28  # doubling beyond this would hold back disk that nobody may come to need


class GrowingMemmapStorage(LazyMemmapStorage):
    """Rows in memory-mapped files, one a key, beside one word a row that says whether the row is whole.

    A row is written in three moves: its word is set to 0, its values are copied, its word is set to its number + 1. The
    length is the number of leading rows with the right word, whatever killed the writer. Several processes may read
    while one writes. (The moves are ordered by the processor's store order on x86, and on ARM by the locks that torch
    and Python take between them.)

    Args:
        folder: where the files lie.
        schema: what a row looks like; checked before every write.
        mode: ``"w"`` begins empty, ``"a"`` goes on writing, ``"r"`` reads only, also from a read-only file system.
        name: of the artifact, for messages.
        generation: number of the set of files; rewriting an artifact makes a new one.
    """

    supports_conditional_update = False  # rows are written once

    def __init__(
        self, folder: Path, schema: Schema, *, mode: Literal["r", "w", "a"], name: str = "row", generation: int = 0
    ) -> None:
        # compilable=True keeps the counters plain: shared ones start a resource tracker process
        super().__init__(_MAX_ROWS, scratch_dir=folder, compilable=True)
        self._revision = 0
        self.folder = folder
        self.schema = schema
        self.name = name
        self.writable = mode != "r"
        self.attach_files(generation, create=mode == "w")

    def attach_files(self, generation: int, *, create: bool = False) -> None:
        """Switch to a set of files and count its rows."""
        self.generation = generation
        keys = enumerate(self.schema.columns.values())
        self._columns = {c.key: self._file(file_name(generation, i, c.key), c.shape, c.dtype) for i, c in keys}
        self._words = self._file(f"{generation}.commits", (), torch.int64)
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._create()
        self._len = 0
        self._map()
        self._len = self._count(0)
        if self.writable:
            # a word beyond the first gap would count again as soon as the gap is filled
            self._words.rows[self._len :].zero_()
        self._bump_mutation_revision()

    def _file(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> ColumnFile:
        return ColumnFile(self.folder / name, shape, dtype, writable=self.writable)

    def _create(self) -> None:
        row_bytes = sum(column.row_bytes for column in self._columns.values())
        for file in self._files():
            file.create()
            file.reserve(max(1, min(_FIRST_ROWS, _FIRST_BYTES // row_bytes)))

    def _files(self) -> list[ColumnFile]:
        # the words come last: readers take the capacity from them, so the values have to be there already
        return [*self._columns.values(), self._words]

    def _map(self) -> None:
        # values may have less room than words, where the disk was full in between, and by now more than the words
        # that are mapped, where a writer has grown all files since
        room = self._words.size()
        self._words.map(room)
        capacity = min([room, *(column.size() for column in self._columns.values())])
        for column in self._columns.values():
            column.map(capacity)
        self._storage = _nested({key: column.rows for key, column in self._columns.items()}, capacity)
        self._capacity = capacity
        self.initialized = True

    def _count(self, start: int) -> int:
        words = self._words.rows
        wrong = words[start:] != torch.arange(start + 1, len(words) + 1, device="cpu")
        length = start + int(wrong.to(torch.uint8).argmax()) if bool(wrong.any()) else len(words)
        if length > self._capacity:
            short = min(self._files(), key=ColumnFile.size)
            raise SchemaError(f"{short.path} holds {short.size()} rows, expected {length}: the file was cut")
        return length

    def refresh(self) -> None:
        """Take in what another process has written since; nothing to do for a writer."""
        if self.writable:
            return
        if not self._words.path.exists():
            return  # the run was deleted; what is mapped can still be read
        if self._words.size() > self._capacity:
            self._map()
        back = self._len > 0 and self._words.number(self._len - 1) != self._len  # the writer went to an earlier step
        more = self._len < self._capacity and self._words.number(self._len) == self._len + 1
        if back or more:
            self._len = self._count(0 if back else self._len)
            self._bump_mutation_revision()

    # --- writing

    def append(self, row: Row) -> int:
        """Commit one row and return its position.

        Raises:
            SchemaError: the row differs from the schema; nothing is written.
            ClosedError: opened for reading.
            OSError: the disk is full; nothing is lost, and the next append tries again.
        """
        self._check_writable()
        self.schema.check(row, of=self.name)
        index = self._len
        self._reserve(index + 1)
        self._words.put(index, 0)
        for key, column in self._columns.items():
            column.put(index, row[key])
        self._words.put(index, index + 1)
        self._len = index + 1
        self._bump_mutation_revision()
        return index

    def extend(self, rows: TensorDictBase) -> Tensor:
        """Commit several rows, batch first, and return their positions; a kill keeps the leading ones.

        Raises:
            SchemaError: the rows differ from the schema; none is written.
        """
        self._check_writable()
        values = {as_key(key): value for key, value in rows.items(include_nested=True, leaves_only=True)}
        self.schema.check(values, of=self.name, batched=True)
        start, end = self._len, self._len + rows.batch_size[0]
        self._reserve(end)
        self._words.rows[start:end] = 0
        for key, column in self._columns.items():
            column.rows[start:end].copy_(values[key].detach())
        index = torch.arange(start, end, device="cpu")
        self._words.rows[start:end] = index + 1
        self._len = end
        self._bump_mutation_revision()
        return index

    def _check_writable(self) -> None:
        if not self.writable:
            raise ClosedError(f"{self.name!r} was opened for reading; open it with mode='a' to write")

    def _reserve(self, rows: int) -> None:
        if rows <= self._capacity:
            return
        if rows > self.max_size:
            raise SettingsError(f"{self.name!r} holds {self._len} rows; {self.max_size} is the most there can be")
        row_bytes = sum(file.row_bytes for file in self._files())
        capacity = max(rows, min(2 * self._capacity, self._capacity + max(1, _GROWTH_BYTES // row_bytes)))
        try:
            for file in self._files():
                file.reserve(capacity)
        except OSError:
            for column in self._columns.values():
                column.give_back(self._capacity)
            raise
        self._map()

    def cut(self, length: int) -> None:
        """Drop every row from ``length`` on; the files keep their size, since others may have mapped them."""
        self._check_writable()
        self._words.rows[length : self._len].zero_()
        self._len = min(length, self._len)
        self._bump_mutation_revision()

    def flush(self) -> None:
        """Wait until all rows are on the disk: values first, so that a power cut commits nothing that is not there."""
        for file in self._files():
            file.sync()

    # --- reading

    def column(self, key: Key) -> Tensor:
        """Return one key's committed values in write order, a view of the file.

        Raises:
            KeyMissingError: there is no such key.
        """
        if key not in self._columns:
            hint = did_you_mean(key_name(key), map(key_name, self._columns))
            raise KeyMissingError(f"{self.name!r} has no key {key_name(key)!r}{hint}")
        return self._columns[key].rows[: self._len]

    def rows(self, index: Tensor) -> TensorDict:
        """Return copies of the rows at these positions, batch first, reading no others."""
        return _nested({key: column.rows[index] for key, column in self._columns.items()}, len(index))

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
        self.cut(0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: ARG002
        """Refuse: the rows are in the files already."""
        raise SettingsError(f"rows of {self.name!r} live in {self.folder}; open the run instead of loading a state")


def _nested(values: dict[Key, Tensor], batch: int) -> TensorDict:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        branch = tree
        for part in key[:-1]:
            branch = branch.setdefault(part, {})
        branch[key[-1]] = value
    return TensorDict(tree, batch_size=[batch], device=torch.device("cpu"))
