"""Which place in the files holds which row."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Collection, Sequence
from threading import RLock
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["Places"]

P = ParamSpec("P")
T = TypeVar("T")


def _locked(method: Callable[Concatenate[Places, P], T]) -> Callable[Concatenate[Places, P], T]:
    """A tensor over an array is not to be read while the array moves, which a thread that writes makes it do."""

    @functools.wraps(method)
    def locked(self: Places, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class Places:
    """Rows are numbered in the order in which they were written; each lies in some place of the files.

    As long as nothing but the last rows was ever dropped, row ``i`` lies in place ``i``, and nothing is kept here but
    their number.
    """

    def __init__(self) -> None:
        self._lock = RLock()
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

    @_locked
    def read(self, places: Tensor, words: Tensor, without: Collection[int] = ()) -> None:
        """Take the rows that lie in these places, by their words, leaving some places out for good."""
        if without:
            stays = ~torch.isin(places, torch.tensor([*without], device="cpu"))
            places, words = places[stays], words[stays]
        order = torch.argsort(words)
        self._length = len(places)
        self._end = max([int(places[-1]) + 1 if len(places) else 0, *(place + 1 for place in without)])
        self._order, self._free = None, []
        if self._end > self._length or bool((order[1:] < order[:-1]).any()):
            self._order = array("q", places[order].tolist())
            free = torch.ones(self._end, dtype=torch.bool, device="cpu")
            free[[*places.tolist(), *without]] = False
            self._free = free.nonzero()[:, 0].tolist()

    @_locked
    def next(self, n: int, limit: int) -> list[int]:
        """Return where the next rows go: ``n`` places below ``limit``, or as many as there are."""
        if self._free:
            return self._free[:n]
        return list(range(self._end, min(self._end + n, limit)))

    @_locked
    def extend(self, places: Sequence[int]) -> None:
        """Take in rows that were just written to the places :meth:`next` gave, behind the others."""
        if self._order is not None:
            self._order.extend(places)
        self._length += len(places)
        if self._free:
            del self._free[: len(places)]
        elif places:
            self._end = places[-1] + 1

    @_locked
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
        # the lowest first: a reader to whom rows lie where their numbers say finds the next one behind the last
        self._free = sorted(self._free + places)
        return places

    @_locked
    def of(self, numbers: Tensor) -> Tensor:
        """Return the places of rows."""
        return numbers if self._order is None else self._as_tensor(self._order)[numbers]

    @_locked
    def all(self) -> Tensor:
        """Return the place of every row, in the order in which they were written."""
        if self._order is None:
            return torch.arange(self._length, device="cpu")
        return self._as_tensor(self._order).clone()

    @staticmethod
    def _as_tensor(order: array[int]) -> Tensor:
        # a view, which callers let go of before the array can grow
        return torch.frombuffer(order, dtype=torch.int64) if order else torch.empty(0, dtype=torch.int64, device="cpu")
