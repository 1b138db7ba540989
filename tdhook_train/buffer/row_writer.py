"""Rows on disk, as they are written: the commit protocol, growth, and what goes when there are too many."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tdhook_train.buffer.column_file import sync
from tdhook_train.buffer.entry import Entry
from tdhook_train.buffer.row import META, Key
from tdhook_train.buffer.rows import Damaged, Rows
from tdhook_train.errors import DamagedError, DiskError, SettingsError

__all__ = ["MAX_ROWS", "RowWriter"]

MAX_ROWS = 2**31 - 1  # samplers draw int32 positions
_FIRST_BYTES = 2**18  # room at first, in bytes and in rows, whichever is less
_FIRST_ROWS = 256
# A file that grows is mapped anew, and only what is touched of a mapping stays in memory: this bounds both.
_GROWTH_BYTES = 2**24
_ATTEMPT_BITS = 40  # below them, a word counts the rows of one attempt


class RowWriter(Rows):
    """Rows that are written: one place after another, or those that dropped rows have left.

    A row is written in three moves: its place is marked as holding none, its values are copied, its record is
    committed. Where a limit is set, rows go only after the new one is there: a kill leaves one too many, never one too
    few. (The moves are ordered by the processor's store order on x86, and on ARM by the locks that torch and Python
    take between them.)

    Args:
        folder: where the files lie.
        entry: what a row looks like, and how many are kept.
        mode: ``"w"`` begins empty, ``"a"`` goes on.
        attempt: which one this is, in writing.
        damaged: what to do about damaged rows, as for reading.

    Raises:
        DamagedError: a file is shorter than the rows it should hold; growing it would put zeros in their place.
        DiskError: there is no room to begin.
    """

    writable = True

    def __init__(
        self, folder: Path, entry: Entry, *, mode: Literal["w", "a"], attempt: int = 0, damaged: Damaged = "raise"
    ) -> None:
        self.own = mode == "w"
        self._next_word = (attempt << _ATTEMPT_BITS) + 1
        super().__init__(folder, entry, damaged=damaged)
        if not self.own:
            self._go_on()

    def _first_own(self) -> int:
        return self._next_word

    def _prepare(self) -> None:
        self.limit(self.entry)
        if self.own:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in self._all_files():
                file.create()
            self._claim(max(1, min(_FIRST_ROWS, _FIRST_BYTES // self.row_bytes, self._room)), 0)

    def _go_on(self) -> None:
        words = self._commits.words
        used = (words > 0).nonzero()[:, 0]
        for column in self._columns:
            if len(used) and len(column.rows) <= int(used[-1]):
                raise DamagedError(
                    f"{column.path} was cut or is missing: it holds {len(column.rows)} of {int(used[-1]) + 1} rows; "
                    "the others can be read, and ArtifactBuffer.merge copies them to a new folder"
                )
        self._next_word = max(self._next_word, int(words.abs().max()) + 1 if len(words) else 0)
        self._files.sweep(words[used].tolist())
        self._let_go()

    # --- how much there may be

    def limit(self, entry: Entry) -> None:
        """Keep as many rows as the entry says, from now on.

        Raises:
            SettingsError: ``max_bytes`` has no room for two rows.
        """
        kept, room = entry.retention, MAX_ROWS
        if kept.capacity is not None:
            room = kept.capacity + _spare(kept.capacity)
        if kept.max_bytes is not None:
            room = min(room, kept.max_bytes // self.row_bytes - 1)  # one record stands before that of the first row
            if room < 2:
                raise SettingsError(
                    f"{self.name}: max_bytes={kept.max_bytes} has no room for two rows of {self.row_bytes} bytes; "
                    f"give at least {3 * self.row_bytes}"
                )
        most = room - _spare(room * 8 // 9) if kept.limited else room
        self._room, self._most = room, min(most, kept.capacity or most)
        self.entry = entry
        self._let_go()

    def _let_go(self, numbers: Sequence[int] = ()) -> list[int]:
        """Drop the rows that are too many, and return where those of the given numbers stand now, if they stay."""
        kept, left = self.entry.retention, list(numbers)
        if (over := len(self) - self._most) > 0:
            left = self._forget(self._victims(over), left)
        while kept.max_bytes is not None and self._files.keys and len(self) > 1 and self._bytes() > kept.max_bytes:
            left = self._forget(self._victims(1), left)
        return left

    def _forget(self, gone: list[int], numbers: list[int]) -> list[int]:
        self.drop(gone)
        dropped = set(gone)
        return [number - bisect_left(gone, number) for number in numbers if number not in dropped]

    def _victims(self, n: int) -> list[int]:
        kept, (places, words) = self.entry.retention, self.index()
        values = None if kept.key is None else self.column(kept.key, places, words)[0]
        return kept.victims(n, self._commits.meta["meta", "step"][places], values)

    def _bytes(self) -> int:
        words = self.index()[1].tolist()
        return (1 + len(words)) * self.row_bytes + self._files.bytes(words)

    # --- growth

    def _grow(self, rows: int) -> None:
        if rows <= self.capacity:
            return
        capacity = max(rows, min(2 * self.capacity, self.capacity + max(8, _GROWTH_BYTES // self.row_bytes)))
        self._claim(min(capacity, self._room), self.capacity)
        self._map()

    def _claim(self, capacity: int, before: int) -> None:
        try:
            for file in self._all_files():
                file.reserve(capacity)
        except OSError as error:
            for file in self._all_files():
                if file.path.exists():
                    file.give_back(before)
            size = (capacity - before) * self.row_bytes
            raise DiskError(
                error.errno,
                f"{error.strerror}: no room for {capacity - before} more rows ({size} bytes) of {self.name!r}; what "
                "was written before is whole",
                str(self.folder),
            ) from error

    # --- writing

    def append(self, row: Mapping[Key, Any], meta: Sequence[float]) -> int:
        """Commit one row, given with its meta in the order of ``META``; return its number, -1 if others are kept.

        Raises:
            DiskError: the disk is full; nothing is lost, and the next append tries again.
        """
        place = self._next(1)[0]
        self._commits.invalidate(place)
        for key, column in zip(self._keys, self._columns, strict=True):
            column.rows[place].copy_(row[key])
        word = self._next_word
        sums = (
            [column.checksum(place) for column in self._columns] if self.entry.checksums else [0] * len(self._columns)
        )
        self._commits.commit(place, word, meta, sums + self._write_files(word, row))
        self._next_word = word + 1
        self._places.extend([place])
        kept = self._let_go([len(self) - 1])
        return kept[0] if kept else -1

    def _write_files(self, word: int, row: Mapping[Key, Any]) -> list[int]:
        try:
            return self._files.write(word, row) if self._files.keys else []
        except OSError as error:
            raise DiskError(
                error.errno, f"{error.strerror}: no room for the files of a row of {self.name!r}", str(self.folder)
            ) from error

    def extend(self, values: Mapping[Key, Tensor], n: int) -> list[int]:
        """Commit ``n`` rows, given by key with their meta, rows first; a kill keeps the leading ones.

        Returns:
            The numbers of those that are kept.
        """
        numbers: list[int] = []
        done = 0
        while done < n:
            places = self._next(n - done)
            part = slice(done, done + len(places))
            self._write({key: value[part] for key, value in values.items()}, places)
            numbers = self._let_go([*numbers, *range(len(self) - len(places), len(self))])
            done += len(places)
        return numbers

    def _write(self, values: Mapping[Key, Tensor], places: list[int]) -> None:
        where = torch.tensor(places, device="cpu")
        into = slice(places[0], places[-1] + 1) if bool((where.diff() == 1).all()) else where
        self._commits.rows[into, 0] = 0
        for key, column in zip(self._keys, self._columns, strict=True):
            column.rows[into] = values[key].detach().to("cpu")
        words = torch.arange(self._next_word, self._next_word + len(places), device="cpu")
        if self.entry.checksums:
            sums = [column.checksums(where) for column in self._columns]
        else:
            sums = [torch.zeros(len(places), dtype=torch.int64, device="cpu") for _ in self._columns]
        self._commits.commit_many(where, words, [values[key] for key in META], sums)
        self._next_word += len(places)
        self._places.extend(places)

    def _next(self, n: int) -> list[int]:
        places = self._places.next(n, self._room)
        if not places:
            raise SettingsError(f"{self.name!r} holds {len(self)} rows, the most there can be")
        self._grow(max(places) + 1)
        return places

    def drop(self, numbers: Sequence[int]) -> None:
        """Drop rows, given by number in ascending order, for good; the files keep their size."""
        places = torch.tensor(self._places.remove(numbers), dtype=torch.int64, device="cpu")
        words = self.words(places).tolist()
        self._commits.drop(places)
        self._files.drop(words)

    def sync(self) -> None:
        """Wait until all rows are on the disk: values first, so that a power cut commits nothing that is not there."""
        self._files.sync()
        for file in self._all_files():
            sync(file.path)
        sync(self.folder)


def _spare(rows: int) -> int:
    return max(1, min(rows // 8, 1024))
