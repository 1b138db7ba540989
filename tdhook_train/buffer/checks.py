"""Whether what is stored is what was written: checksums, each looked at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook_train.buffer.column_file import ColumnFile
from tdhook_train.buffer.commit_file import CommitFile

__all__ = ["Checks"]

_NEVER = 2**63 - 1
_RECORD: tuple[int, ...] = ()  # beside the numbers of columns


class Checks:
    """Compares rows with their checksums when they are first read; rows of this process are trusted.

    Args:
        commits: the records of the rows.
        columns: the values of the rows.
    """

    def __init__(self, commits: CommitFile, columns: Sequence[ColumnFile]) -> None:
        self._commits = commits
        self._columns = columns
        self.own = _NEVER  # the first word of rows that this process wrote
        self._seen: dict[tuple[int, ...], Tensor] = {}  # by columns: the word of the row found whole in each place

    def records(self, places: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the places hold rows, and those whose record is damaged; their words are those of rows."""
        held, new = words > 0, self._new(_RECORD, places, words)
        some, of = places[new], words[new]
        whole = self._commits.held(some, of)
        gone = ~whole
        gone[~whole] = self._commits.gone(some[~whole], of[~whole])
        held[new] = whole
        return held, self._sort_out(_RECORD, some, of, whole | gone)

    def values(self, columns: tuple[int, ...], places: Tensor, words: Tensor) -> dict[int, Tensor]:
        """Return, by column, those of the places whose value is damaged, or was lost with the end of the file."""
        new = (words > 0) & self._new(columns, places, words)
        if not bool(new.any()):
            return {}
        places, words = places[new], words[new]
        good = {column: self._whole(column, places) for column in columns}
        self._sort_out(columns, places, words, torch.stack([*good.values()]).all(0))
        # of a row that was replaced in the meantime nothing is damaged
        damaged = {column: self._still(places[~whole], words[~whole]) for column, whole in good.items()}
        return {column: bad for column, bad in damaged.items() if len(bad)}

    def _whole(self, column: int, places: Tensor) -> Tensor:
        there = places < len(self._columns[column].rows)
        expected = self._commits.expected(column, places[there])
        whole = there.clone()
        whole[there] = (expected == 0) | (expected == self._columns[column].checksums(places[there]))
        return whole

    def _new(self, what: tuple[int, ...], places: Tensor, words: Tensor) -> Tensor:
        seen, room = self._seen.get(what), len(self._commits.rows)
        if seen is None or len(seen) < room:
            self._seen[what] = torch.zeros(room, dtype=torch.int64, device="cpu")
            if seen is not None:
                self._seen[what][: len(seen)] = seen
        return (words < self.own) & (self._seen[what][places] != words)

    def _sort_out(self, what: tuple[int, ...], places: Tensor, words: Tensor, whole: Tensor) -> Tensor:
        self._seen[what][places[whole]] = words[whole]
        return self._still(places[~whole], words[~whole])

    def _still(self, places: Tensor, words: Tensor) -> Tensor:
        return places[self._commits.words[places] == words]
