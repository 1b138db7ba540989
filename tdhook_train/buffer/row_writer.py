"""Rows on disk, as they are written: the commit protocol, growth, and what goes when there are too many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from tdhook_train.buffer.column_file import sync
from tdhook_train.buffer.commit_file import BUSY
from tdhook_train.buffer.disk import disk_errors
from tdhook_train.buffer.entry import Entry
from tdhook_train.buffer.retention import Retention
from tdhook_train.buffer.row import META, Key
from tdhook_train.buffer.rows import Damaged, Rows
from tdhook_train.errors import DamagedError, SettingsError

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
        entry: what a row looks like, and how many are kept: as many as there come, where it does not say.
        mode: ``"w"`` begins empty, ``"a"`` goes on.
        attempt: which one this is, in writing.
        damaged: what to do about damaged rows, as for reading.

    Raises:
        DamagedError: a file is shorter than the rows it should hold, or holds rows that nothing describes.
        DiskError: there is no room to begin.
    """

    writable = True

    def __init__(
        self, folder: Path, entry: Entry, *, mode: Literal["w", "a"], attempt: int = 0, damaged: Damaged = "raise"
    ) -> None:
        self.own = mode == "w"
        self.process = os.getpid()
        self._next_word = (attempt << _ATTEMPT_BITS) + 1
        super().__init__(folder, entry, damaged=damaged)
        if not self.own:
            self._go_on()
        self._checks.own = self._next_word

    def _prepare(self) -> None:
        self.limit(self.entry)
        if not self.own:
            return
        if self._commits.used_behind(0):
            raise DamagedError(f"{self.folder} holds rows that neither the manifest nor a schema describes")
        with disk_errors(f"no room to begin {self.name!r}", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in self._all_files():
                file.create()
        self._claim(min(_FIRST_ROWS, max(1, _FIRST_BYTES // self.row_bytes), self._most_at_once()), 0)

    def _go_on(self) -> None:
        places, words = self.index()
        used = int(places.max()) + 1 if len(places) else 0
        for column in self._columns:
            if len(column.rows) < used:
                raise DamagedError(
                    f"{column.path} was cut or is missing: it holds {len(column.rows)} of {used} rows; the others can "
                    "be read, and ArtifactBuffer.merge copies them to a new folder"
                )
        with disk_errors(f"no room for what copied files of {self.name!r} left out", self.folder):
            for file in self._all_files():
                file.fill_holes()
        self._commits.note_room()
        self._next_word = max(self._next_word, int(words.max()) + 1 if len(words) else 0)
        self._files.sweep(self._commits.words)
        self._let_go()

    def _lose(self, what: str) -> NoReturn:
        raise DamagedError(f"{what}; growing the file would write over them")

    # --- how much there may be

    def limit(self, entry: Entry) -> None:
        """Keep as many rows as the entry says, from now on.

        Raises:
            SettingsError: ``max_bytes`` has no room for two rows.
        """
        kept, room = entry.retention or Retention(), MAX_ROWS
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
        self.entry, self._kept = entry, kept
        self._let_go()

    def _most_at_once(self) -> int:
        """Return by how many rows the files may grow; where files of rows are counted too, blocks are not hoarded."""
        limit = self._kept.max_bytes
        return self._room if limit is None or not self._files.keys else max(1, limit // 16 // self.row_bytes)

    def _let_go(self) -> None:
        kept = self._kept
        while (over := len(self) - self._most) > 0:
            self.drop(self._victims(over))
        while kept.max_bytes is not None and self._files.keys and len(self) > 1 and self._bytes() > kept.max_bytes:
            self.drop(self._victims(1))

    def _victims(self, n: int) -> list[int]:
        kept, (places, words) = self._kept, self.index()
        steps, values = self._commits.meta["meta", "step"][places], None
        if kept.key is not None:
            column = self._column_of(kept.key)
            if bad := self._checks.values((column,), places, words):  # which must not stop the training: they go first
                return torch.isin(places, bad[column]).nonzero()[:n, 0].tolist()
            values = self._columns[column].rows[places]
        return kept.victims(n, steps, values)

    def _bytes(self) -> int:
        return sum(file.path.stat().st_size for file in self._all_files() if file.row_bytes) + self._files.bytes()

    # --- growth

    def _grow(self, rows: int) -> None:
        if rows <= self.capacity:
            return
        more = min(self.capacity, max(8, _GROWTH_BYTES // self.row_bytes), self._most_at_once())
        self._claim(max(rows, min(self.capacity + more, self._room)), self.capacity)
        self._map()

    def _claim(self, capacity: int, before: int) -> None:
        more = capacity - before
        what = f"{more} more rows ({more * self.row_bytes} bytes) of {self.name!r}"
        with disk_errors(f"no room for {what}; what was written before is whole", self.folder):
            try:
                for column in self._columns:
                    column.reserve(capacity)
            except OSError:
                for column in self._columns:  # which nobody has mapped so far: readers go by the records
                    column.give_back(before)
                raise
            self._commits.reserve(capacity)
        self._commits.note_room()

    # --- writing

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Whatever stops a write, what counts afterwards is what the records say."""
        try:
            yield
        except BaseException:
            self._count()
            self._files.sweep(self._commits.words)
            raise

    def append(self, row: Mapping[Key, Any], meta: Sequence[float]) -> int:
        """Commit one row, given with its meta in the order of ``META``; return its number, -1 if others are kept.

        Raises:
            DiskError: the disk is full; nothing is lost, and the next append tries again.
        """
        files = self._files.dumped(row)
        self._refuse_too_large(files)
        with self._writing():
            place, word = self._next(1)[0], self._take_words(1)
            self._commits.invalidate(place)
            for key, column in zip(self._keys, self._columns, strict=True):
                column.rows[place].copy_(row[key])
            checked = self.entry.checksums
            sums = [column.checksum(place) if checked else 0 for column in self._columns]
            with disk_errors(f"no room for the files of a row of {self.name!r}", self.folder):
                sums += self._files.write(word, files)
            self._commits.commit(place, word, meta, sums)
            self._places.extend([place])
            self._let_go()
        return len(self) - 1 if self._commits.word(place) == word else -1

    def extend(self, values: Mapping[Key, Tensor], n: int) -> list[int]:
        """Commit ``n`` rows, given by key with their meta, rows first; a kill keeps the leading ones.

        Returns:
            The numbers of those that are kept.
        """
        first, done = self._next_word, 0
        with self._writing():
            while done < n:
                places = self._next(n - done)
                part = slice(done, done + len(places))
                self._write({key: value[part] for key, value in values.items()}, places)
                self._let_go()
                done += len(places)
        return self.numbers_since(first)

    def numbers_since(self, word: int) -> list[int]:
        """Return the numbers of the rows that were written since."""
        return list(range(len(self) - int((self.index()[1] >= word).sum()), len(self)))

    @property
    def next_word(self) -> int:
        """The word that the next row will have."""
        return self._next_word

    def _take_words(self, n: int) -> int:
        word = self._next_word
        self._next_word += n  # also if the write fails: files of a row that never was are not taken for another's
        return word

    def _refuse_too_large(self, files: Mapping[Key, Any]) -> None:
        limit = self._kept.max_bytes
        size = sum(len(data) for data, _ in files.values())
        if limit is not None and size and size + self._bytes() - self._files.bytes() > limit:
            raise SettingsError(f"{self.name}: a row with {size} bytes of files has no room in max_bytes={limit}")

    def _write(self, values: Mapping[Key, Tensor], places: list[int]) -> None:
        where = torch.tensor(places, device="cpu")
        into = slice(places[0], places[-1] + 1) if bool((where.diff() == 1).all()) else where
        first = self._take_words(len(places))
        self._commits.rows[into, 0] = BUSY
        for key, column in zip(self._keys, self._columns, strict=True):
            column.rows[into] = values[key].detach().to("cpu")
        words = torch.arange(first, first + len(places), device="cpu")
        if self.entry.checksums:
            sums = [column.checksums(where) for column in self._columns]
        else:
            sums = [torch.zeros(len(places), dtype=torch.int64, device="cpu") for _ in self._columns]
        self._commits.commit_many(where, words, [values[key] for key in META], sums)
        self._places.extend(places)

    def _next(self, n: int) -> list[int]:
        places = self._places.next(n, self._room + len(self._left_out))  # which damaged rows take up for good
        if not places:
            raise SettingsError(f"{self.name!r} holds {len(self)} rows, the most there can be")
        self._grow(max(places) + 1)
        return places

    def drop(self, numbers: Sequence[int]) -> None:
        """Drop rows, given by number in ascending order, for good; the files keep their size."""
        places = self.places(torch.tensor([*numbers], dtype=torch.int64, device="cpu"))
        words = self.words(places).tolist()
        self._commits.drop(places)
        self._places.remove(numbers)
        self._files.drop(words)

    def sync(self) -> None:
        """Wait until all rows are on the disk: values first, so that a power cut commits nothing that is not there."""
        self._files.sync()
        for file in self._all_files():
            sync(file.path)
        sync(self.folder)


def _spare(rows: int) -> int:
    return max(1, min(rows // 8, 1024))
