"""The direction from the mean of one side to that of the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_train.latent.direction import Direction
from tdhook_train.ops.directions import between_means

__all__ = ["MeanDifferenceDirection"]


@dataclass(frozen=True)
class MeanDifferenceDirection(Direction):
    """Which way the mean activation of a layer moves from one side to the other.

    Takes no account of the spread within the sides: where units vary together, other directions tell the sides apart
    better (:class:`LogisticDirection`), yet the layer moves this way, which steering goes by. No pass of its own with
    labels, two without.

    Args:
        layers: see :class:`Direction`, as are ``concept`` and ``folds``.

    Writes:
        What :class:`Direction` does.

    Source: Rimsky et al. 2023, arXiv:2312.06681; Marks and Tegmark 2023, arXiv:2310.06824.
    """

    def found(self, x: Tensor, marks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - of other members
        """Subtract the means."""
        return between_means(x, marks), marks.new_ones(marks.shape[1])
