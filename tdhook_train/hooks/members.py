"""Tensors inside ``torch.vmap``, where the dimension of the members is hidden, and outside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Members"]

_functorch = torch._C._functorch


@dataclass(frozen=True)
class Members:
    """Where vmap hides the dimensions of its members, outermost level first; empty outside any vmap.

    A value that leaves the pass carries the members in leading dimensions: a hidden one could not be used there.
    """

    levels: tuple[int, ...]
    dims: tuple[int, ...]  # each as seen at its own level
    raw: Tensor  # with every dimension in sight

    @classmethod
    def of(cls, tensor: Tensor) -> Members:
        """Look behind a tensor."""
        levels: list[int] = []
        dims: list[int] = []
        while _functorch.is_batchedtensor(tensor):
            levels.insert(0, _functorch.maybe_get_level(tensor))
            dims.insert(0, _functorch.maybe_get_bdim(tensor))
            tensor = _functorch.get_unwrapped(tensor)
        return cls(tuple(levels), tuple(dims), tensor)

    def __bool__(self) -> bool:
        """Whether there are members at all."""
        return bool(self.levels)

    def order(self) -> tuple[int, ...]:
        """Return the dimensions of the raw tensor, members first."""
        left = list(range(self.raw.ndim))
        return (*[left.pop(dim) for dim in self.dims], *left)

    def seen(self, raw: Tensor) -> Tensor:
        """Bring the members of a raw tensor to the front."""
        return raw.permute(self.order()) if self else raw

    def unseen(self, seen: Tensor) -> Tensor:
        """Put the members back where the raw tensor has them."""
        order = self.order()
        return seen.permute([order.index(i) for i in range(len(order))]) if self else seen

    def hidden(self, seen: Tensor) -> Tensor:
        """Hide leading member dimensions again, for use inside vmap."""
        for level in self.levels:
            seen = _functorch._add_batch_dim(seen, 0, level)
        return seen
