"""Attention weights of several heads and layers, brought together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["FUSIONS", "fused", "rolled_out"]

FUSIONS = ("mean", "max", "min")


def fused(weights: Tensor, how: str) -> Tensor:
    """Make one of several heads: ``[batch, head, query, key]`` to ``[batch, query, key]``.

    Args:
        weights: of the heads.
        how: one of :data:`FUSIONS`.
    """
    return weights.mean(1) if how == "mean" else weights.amax(1) if how == "max" else weights.amin(1)


def rolled_out(layers: Sequence[Tensor]) -> Tensor:
    """Multiply the attention of layers, half of each going past it: Ã_L ... Ã_1, rows of Ã summing to 1.

    Args:
        layers: in the order in which they run, ``[batch, position, position]`` each.

    Returns:
        ``[batch, position, position]``, float64: of each position at the end, the shares of those at the beginning.
    """
    identity = torch.eye(layers[0].shape[-1], dtype=torch.float64, device=layers[0].device)
    rollout = identity.expand(layers[0].shape)
    for weights in layers:
        passing = weights.double() + identity
        rollout = (
            passing / passing.sum(-1, keepdim=True) @ rollout
        )  # Ã = ½ (A + I), rows made to sum to 1: no ½ is left
    return rollout
