"""How many directions a layer uses, by energy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdhook_train.health.spectral import Spectral, keys_of
from tdhook_train.ops.spectrum import stable_rank

__all__ = ["StableRank"]


@dataclass(frozen=True)
class StableRank(Spectral):
    """How many directions as large as the largest would hold a layer's energy: ``‖X‖²_F / σ₁²``.

    At most the rank, and unmoved by small singular values, so by noise. Orthonormal columns give the width, rank one
    gives 1. Costs no pass of its own. What the Gram matrix loses is below 1e-15 of the energy a direction.

    Args:
        layers: see :class:`.Spectral`.

    Writes:
        ``stable_rank``, ``stable_rank_centred`` [layer]. ``stable_rank_pooled``, ``stable_rank_centred_pooled``: see
        :class:`.Spectral`.

    Source: Rudelson and Vershynin 2007, arXiv:math/0503442 (there the numerical rank).
    """

    name: ClassVar[str] = "stable_rank"
    writes: ClassVar[Mapping[str, str]] = keys_of("stable_rank")

    def rank(self, sigma: Tensor, rows: int) -> Tensor:  # noqa: ARG002 - the same for any number of rows
        """Divide the energies."""
        return stable_rank(sigma)
