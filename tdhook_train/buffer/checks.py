"""Whether what is stored is what was written: checksums, each looked at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook_train.buffer.column_file import ColumnFile
from tdhook_train.buffer.commit_file import CommitFile

__all__ = ["Checks"]


class Checks:
    """Compares rows with their checksums when they are first read; rows of this process are trusted.

    Args:
        commits: the records of the rows.
        columns: the values of the rows.
        own: the first word of rows that this process wrote.
    """

    def __init__(self, commits: CommitFile, columns: Sequence[ColumnFile], own: int) -> None:
        self._commits = commits
        self._columns = columns
        self._own = own
        self._seen: dict[tuple[int, ...], Tensor] = {}  # by columns: the word of the row found whole in each place

    def records(self, places: Tensor, words: Tensor) -> Tensor:
        """Return those of the places whose record is damaged."""
        new = self._new((), places, words)
        places, words = places[new], words[new]
        return self._sort_out((), places, words, self._commits.whole(places, words))

    def values(self, columns: tuple[int, ...], places: Tensor, words: Tensor) -> dict[int, Tensor]:
        """Return, by column, those of the places whose value is damaged, or was lost with the end of the file."""
        new = self._new(columns, places, words)
        if not bool(new.any()):
            return {}
        places, words = places[new], words[new]
        good = {column: self._whole(column, places) for column in columns}
        self._sort_out(columns, places, words, torch.stack([*good.values()]).all(0))
        damaged = {column: self._sort_out((column,), places, words, whole) for column, whole in good.items()}
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
        return (words < self._own) & (self._seen[what][places] != words)

    def _sort_out(self, what: tuple[int, ...], places: Tensor, words: Tensor, whole: Tensor) -> Tensor:
        if (seen := self._seen.get(what)) is not None:
            seen[places[whole]] = words[whole]
        # a row that was replaced in the meantime is not damaged, but gone
        return places[~whole & (self._commits.words[places] == words)]
