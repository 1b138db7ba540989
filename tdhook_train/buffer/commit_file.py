"""One record a row: whether the row is whole, what describes it, and the checksums of its values."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar
from zlib import crc32

import torch
from torch import Tensor

from tdhook_train.buffer.column_file import ColumnFile
from tdhook_train.buffer.row import META, Key

__all__ = ["BUSY", "COMMITS", "CommitFile"]

COMMITS = "commits"
BUSY = -(2**63)
_PARALLEL = 2**14  # above 2**15 torch copies in several threads, and later words might be there before earlier ones
_META_FORMAT = "".join("d" if dtype == torch.float64 else "q" for dtype in META.values())


class CommitFile(ColumnFile):
    """Records of a word, the row's meta, one CRC-32 a column and one over all of these.

    The word is 0 in a place that was never used, ``BUSY`` in one that is being written, positive in a committed row,
    and with all its bits turned in one that was dropped. It counts up over all rows ever written, attempts in its
    upper bits: no two rows share one, whichever place they take. The last checksum is taken over the word of the
    committed row too, so that no row is lost, or is back, because a byte of its word was changed.

    The record before that of the first row begins with a number that changes whenever a row is dropped, and with how
    many records the file has, so that one that was cut can be told from one that has not grown.

    Args:
        path: the file.
        columns: how many columns there are.
        writable: as for a :class:`ColumnFile`.
    """

    lead: ClassVar[int] = 1

    def __init__(self, path: Path, columns: int, *, writable: bool) -> None:
        self._format = f"q{_META_FORMAT}{columns}I"
        self._body_bytes = struct.calcsize(self._format)
        numbers = -(-(self._body_bytes + 4) // 8)
        super().__init__(path, (numbers,), torch.int64, writable=writable)
        self._checksums_at = 8 * (1 + len(META))

    def map(self, capacity: int) -> None:
        """Map the records of the first ``capacity`` rows."""
        super().map(capacity)
        self.words = self.rows[:, 0]
        self._halves = self.rows.view(torch.int32)
        # words are stored through these, in one piece: struct.pack_into would put zeros there first
        self._all_words, self._front_words = self.bytes.cast("q"), self.front.cast("q")
        floats = self.rows.view(torch.float64)
        self.meta: dict[Key, Tensor] = {
            key: (floats if dtype == torch.float64 else self.rows)[:, i]
            for i, (key, dtype) in enumerate(META.items(), start=1)
        }

    @property
    def changes(self) -> int:
        """How often rows were dropped."""
        return int(self._front_words[0])

    @property
    def cut(self) -> bool:
        """Whether the file is shorter than it was."""
        return self.size() < self._front_words[1]

    def note_room(self) -> None:
        """Remember how long the file is."""
        with self.path.open("r+b") as file:
            file.seek(8)
            file.write(struct.pack("q", self.size()))

    def word(self, place: int) -> int:
        """Return the word of a place."""
        return int(self._all_words[place * self.row_numel])

    def invalidate(self, place: int) -> None:
        """Say that a place holds no whole row: before its values are written."""
        self._all_words[place * self.row_numel] = BUSY

    def commit(self, place: int, word: int, meta: Sequence[int | float], checksums: Sequence[int]) -> None:
        """Say that a place holds a whole row: after its values were written."""
        at, end = place * self.row_bytes, self._body_bytes
        body = struct.pack(self._format, word, *meta, *checksums)
        self.bytes[at + 8 : at + end] = body[8:]
        struct.pack_into("I", self.bytes, at + end, crc32(body))
        self._all_words[place * self.row_numel] = word

    def commit_many(self, places: Tensor, words: Tensor, meta: Sequence[Tensor], checksums: Sequence[Tensor]) -> None:
        """Say that these places hold whole rows, one after another; each sequence has one tensor a field."""
        for i, field in enumerate(meta, start=1):
            self.rows[places, i] = field.view(torch.int64)
        for i, field in enumerate(checksums):
            self._halves[places, self._checksums_at // 4 + i] = _as_int32(field)
        self._halves[places, self._body_bytes // 4] = _as_int32(self._sums(places, words))
        for part in zip(places.split(_PARALLEL), words.split(_PARALLEL), strict=True):
            self.rows[part[0], 0] = part[1]

    def drop(self, places: Tensor) -> None:
        """Say that these places hold no rows any more."""
        # before and after: so readers look again whether a kill comes in between, or they do
        self._front_words[0] = self.changes + 1
        self.rows[places, 0] = ~self.words[places]
        self._front_words[0] = self.changes + 1

    def held(self, places: Tensor, words: Tensor) -> Tensor:
        """Return, for each place, whether it holds the committed row of that word."""
        return (words > 0) & self._vouched(places, words)

    def gone(self, places: Tensor, words: Tensor) -> Tensor:
        """Return, for each place, whether the row of that word was dropped."""
        return (words < 0) & self._vouched(places, ~words)

    def _vouched(self, places: Tensor, words: Tensor) -> Tensor:
        return self._sums(places, words) == _as_unsigned(self._halves[places, self._body_bytes // 4])

    def _sums(self, places: Tensor, words: Tensor) -> Tensor:
        data, end = self.bytes, self._body_bytes
        starts = [crc32(word) for word in words.numpy().view("V8").tolist()]
        ats = (places * self.row_bytes).tolist()
        sums = [crc32(data[at + 8 : at + end], start) for at, start in zip(ats, starts, strict=True)]
        return torch.tensor(sums, dtype=torch.int64, device="cpu")

    def expected(self, column: int, places: Tensor) -> Tensor:
        """Return the checksums a column's values were written with, int64; 0 where none was kept."""
        return _as_unsigned(self._halves[places, self._checksums_at // 4 + column])


def _as_int32(sums: Tensor) -> Tensor:
    return torch.where(sums >= 2**31, sums - 2**32, sums).to(torch.int32)


def _as_unsigned(halves: Tensor) -> Tensor:
    return halves.to(torch.int64) & 0xFFFFFFFF
