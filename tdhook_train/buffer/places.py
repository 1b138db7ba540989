"""Which place in the files holds which row."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = ["Places"]


class Places:
    """Rows are numbered in the order in which they were written; each lies in some place of the files.

    As long as nothing but the last rows was ever dropped, row ``i`` lies in place ``i``, and nothing is kept here but
    their number.
    """

    def __init__(self) -> None:
        self._length = 0
        self._order: array[int] | None = None  # the place of each row, None where it is its number
        self._free: list[int] = []
        self._end = 0  # behind it, no place was ever used

    def __len__(self) -> int:
        return self._length if self._order is None else len(self._order)

    @property
    def dense(self) -> bool:
        """Whether each row lies in the place of its number."""
        return self._order is None

    def read(self, words: Tensor, without: Collection[int] = ()) -> None:
        """Take the rows from the words of all places, leaving some places out for good."""
        committed = words > 0
        if without:
            committed[list(without)] = False
        places = committed.nonzero()[:, 0]
        order = torch.argsort(words[places])
        self._length = len(places)
        self._end = max([int(places[-1]) + 1 if len(places) else 0, *(place + 1 for place in without)])
        self._order, self._free = None, []
        if self._end > self._length or bool((order[1:] < order[:-1]).any()):
            self._order = array("q", places[order].tolist())
            free = ~committed[: self._end]
            free[list(without)] = False
            self._free = free.nonzero()[:, 0].tolist()

    def next(self, n: int, limit: int) -> list[int]:
        """Return where the next rows go: ``n`` places below ``limit``, or as many as there are."""
        if self._free:
            return self._free[:n]
        return list(range(self._end, min(self._end + n, limit)))

    def extend(self, places: Sequence[int]) -> None:
        """Take in rows that were just written to the places :meth:`next` gave, behind the others."""
        if self._order is not None:
            self._order.extend(places)
        self._length += len(places)
        if self._free:
            del self._free[: len(places)]
        elif places:
            self._end = places[-1] + 1

    def remove(self, numbers: Sequence[int]) -> list[int]:
        """Forget rows, given in ascending order, and return the places they leave."""
        if not numbers:
            return []
        places = self.of(torch.tensor(numbers, dtype=torch.int64, device="cpu")).tolist()
        first, end = numbers[0], numbers[-1] + 1
        if self._order is None and (first, end) == (self._length - len(numbers), self._length):
            self._length = self._end = first
            return places
        order = self._order if self._order is not None else array("q", range(self._length))
        if end - first == len(numbers):
            del order[first:end]
        else:
            keep = torch.ones(len(order), dtype=torch.bool, device="cpu")
            keep[list(numbers)] = False
            order = array("q", self._as_tensor(order)[keep].tolist())
        self._order, self._length = order, len(order)
        self._free += places
        return places

    def of(self, numbers: Tensor) -> Tensor:
        """Return the places of rows."""
        return numbers if self._order is None else self._as_tensor(self._order)[numbers]

    def all(self) -> Tensor:
        """Return the place of every row, in the order in which they were written."""
        if self._order is None:
            return torch.arange(self._length, device="cpu")
        return self._as_tensor(self._order).clone()

    @staticmethod
    def _as_tensor(order: array[int]) -> Tensor:
        # a view, and an array that is viewed cannot grow: callers let go of it at once
        return torch.frombuffer(order, dtype=torch.int64) if order else torch.empty(0, dtype=torch.int64, device="cpu")
