"""Tensors inside ``torch.vmap``, where the dimension of the members is hidden, and outside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Members"]

_functorch = torch._C._functorch


@dataclass(frozen=True)
class Members:
    """Where vmap hides the dimensions of its members, outermost level first.

    A value that leaves the pass carries them in sight: a hidden one could not be used there. They stand after the
    dimensions of the batch, rows first as everywhere, or in front where the batch itself is what vmap hides.
    """

    levels: tuple[int, ...]
    dims: tuple[int, ...]  # each as seen at its own level
    lead: int  # dimensions of the batch before them
    raw: Tensor  # with every dimension in sight

    are_in = staticmethod(_functorch.is_batchedtensor)  # whether a tensor hides any

    @classmethod
    def of(cls, tensor: Tensor, batch: tuple[int, ...]) -> Members | None:
        """Look behind a tensor of a pass over a batch of this size; None where nothing is hidden."""
        if not cls.are_in(tensor):
            return None
        lead = len(batch) if tuple(tensor.shape[: len(batch)]) == batch else 0
        levels: list[int] = []
        dims: list[int] = []
        while cls.are_in(tensor):
            levels.insert(0, _functorch.maybe_get_level(tensor))
            dims.insert(0, _functorch.maybe_get_bdim(tensor))
            tensor = _functorch.get_unwrapped(tensor)
        return cls(tuple(levels), tuple(dims), lead, tensor)

    def _order(self) -> tuple[int, ...]:
        left = list(range(self.raw.ndim))
        members = [left.pop(dim) for dim in self.dims]
        return (*left[: self.lead], *members, *left[self.lead :])

    def outside(self, level: int) -> int:
        """Count those of the members that are hidden at this level already."""
        return sum(one <= level for one in self.levels)

    def seen(self, raw: Tensor) -> Tensor:
        """Bring the members of a raw tensor behind its batch."""
        return raw.permute(self._order())

    def unseen(self, seen: Tensor) -> Tensor:
        """Put the members back where the raw tensor has them."""
        order = self._order()
        return seen.permute([order.index(i) for i in range(len(order))])

    def hidden(self, seen: Tensor, behind: int = 0) -> Tensor:
        """Hide the dimensions of the members again, for use inside vmap; ``behind`` more dimensions than they were."""
        for level in self.levels:
            seen = _functorch._add_batch_dim(seen, self.lead + behind, level)
        return seen
