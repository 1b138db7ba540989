"""Gradients that are zero, not absent, where nothing depends on a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["slopes"]


def slopes(of: Tensor, to: Sequence[Tensor], along: Tensor | None = None, *, keep: bool = False) -> list[Tensor]:
    """Differentiate, without touching anybody's ``.grad``; zeros where nothing depends on a value.

    Args:
        of: what is differentiated.
        to: with respect to what.
        along: weight of each number of ``of``, which is one number where there are no weights.
        keep: the graph, for who differentiates through it again.
    """
    found: Any = [None] * len(to)
    if of.requires_grad and all(value.requires_grad for value in to):
        found = torch.autograd.grad(of, list(to), along, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(value) if slope is None else slope for value, slope in zip(to, found, strict=True)]
