"""How many directions a layer's representation really uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdhook_train.health.spectral import Spectral, keys_of
from tdhook_train.ops.spectrum import effective_rank

__all__ = ["EffectiveRank"]


@dataclass(frozen=True)
class EffectiveRank(Spectral):
    """How many directions of a layer's activations carry its spread: exp of the entropy of its singular values.

    ``exp(-Σ p log p)`` with ``p = σ / Σσ``, σ the singular values of the matrix rows × units. Orthonormal columns give
    the width, rank one gives 1, an all-zero layer is defined as 0. Costs no pass of its own. What the Gram matrix loses
    is less than 1e-6 of the entropy.

    Args:
        layers: see :class:`.Spectral`.

    Writes:
        ``effective_rank``, ``effective_rank_centred`` [layer]. ``effective_rank_pooled``,
        ``effective_rank_centred_pooled``: see :class:`.Spectral`.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """

    name: ClassVar[str] = "effective_rank"
    writes: ClassVar[Mapping[str, str]] = keys_of("effective_rank")

    def rank(self, sigma: Tensor, rows: int) -> Tensor:  # noqa: ARG002 - the same for any number of rows
        """Take the entropy."""
        return effective_rank(sigma)
