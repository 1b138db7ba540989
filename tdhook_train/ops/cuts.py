"""The parts that an activation falls into: all of it, its units, its heads, its positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError

__all__ = ["PARTS", "Cut", "Part", "cut", "shared_out"]

Part = Literal["layer", "unit", "head", "position"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Cut:
    """Parts of a value, one of which each of its entries belongs to.

    Args:
        of: number of the part of every entry, ``[*shape]`` of the value, with 1 where all entries are alike.
        count: how many parts there are; 0 where the value has none of that kind.
    """

    of: Tensor
    count: int

    def masks(self, index: Tensor) -> Tensor:
        """Say which entries belong to each of some parts: ``[part, *shape]``, with 1 where all entries are alike."""
        return self.of == index.to(self.of.device).view(-1, *[1] * self.of.ndim)

    def sums(self, value: Tensor, row_axis: int) -> Tensor:
        """Add up the entries of each part: ``[part, row]`` from ``[*shape]``."""
        rows = value.shape[row_axis]
        if not self.count:
            return value.new_zeros(0, rows)
        number = self.of.expand_as(value).movedim(row_axis, 0).reshape(rows, -1)
        out = value.new_zeros(rows, max(1, self.count))
        return out.scatter_add_(1, number, value.movedim(row_axis, 0).reshape(rows, -1))[:, : self.count].T


def cut(kind: Part, shape: Sequence[int], axes: tuple[int, int], heads: int | None = None) -> Cut:
    """Cut a value into parts.

    Args:
        kind: all of it, its units, heads (equal blocks of units, side by side) or positions (what is neither rows nor
            units, in order).
        shape: of the value.
        axes: along which dimensions its rows and its units lie.
        heads: how many there are.

    Raises:
        SettingsError: the units do not make so many heads of one size.
    """
    row, unit = axes
    alike = [1] * len(shape)
    others = [i for i in range(len(shape)) if i not in axes]
    if kind == "layer":
        return Cut(torch.zeros(alike, dtype=torch.int64), 1)
    if row == unit or (kind == "position" and not others):
        return Cut(torch.zeros(alike, dtype=torch.int64), 0)
    if kind == "position":
        numbers = torch.arange(math.prod(shape[i] for i in others))
        return Cut(numbers.view([size if i in others else 1 for i, size in enumerate(shape)]), len(numbers))
    width = shape[unit]
    numbers = torch.arange(width).view([width if i == unit else 1 for i in range(len(shape))])
    if kind == "unit":
        return Cut(numbers, width)
    if not heads or width % heads:
        raise SettingsError(f"{width} units need a number of heads that divides them, got heads={heads}")
    return Cut(numbers // (width // heads), heads)


def shared_out(parts: Sequence[tuple[Cut, Tensor]], most: int) -> Iterator[list[tuple[Cut, Tensor]]]:
    """Share numbers of parts out among passes, in order: ``most`` of them in each but the last."""
    some: list[tuple[Cut, Tensor]] = []
    room = most
    for cut_, index in parts:
        while len(index):
            some.append((cut_, index[:room]))
            index = index[room:]
            room = most - sum(len(taken) for _, taken in some)
            if not room:
                yield some
                some, room = [], most
    if some:
        yield some
