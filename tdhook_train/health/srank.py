"""How many directions hold nearly all of a layer's singular values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.health.spectral import Spectral, keys_of
from tdhook_train.hooks import HookedModel
from tdhook_train.method import Seen
from tdhook_train.ops.spectrum import srank

__all__ = ["SRank"]

_ENOUGH, _ENOUGH_A_UNIT = 2048, 8


@dataclass(frozen=True)
class SRank(Spectral):
    """How many directions hold all but δ of a layer's singular values: the effective rank of deep Q-learning papers.

    The least k with ``Σ_{i≤k} σᵢ ≥ (1 - δ) Σσ``, in whole numbers. D orthonormal columns give D, as long as one of them
    is more than δ of all (D < 100); rank one gives 1. Costs no pass of its own. Noise adds small singular values whose
    sum grows with the units and shrinks with the rows, so that below max(2048, 8 × width) rows the value depends on
    how many there are; ``srank_few_rows`` says so. What the Gram matrix loses is far less than δ, and sums that reach
    the bound but for 1e-9 count as reaching it.

    Args:
        layers: see :class:`.Spectral`.
        delta: share of the sum of the singular values that may be missing, above 1e-6.

    Writes:
        ``srank``, ``srank_centred`` [layer]. ``srank_pooled``, ``srank_centred_pooled``: see :class:`.Spectral`.
        ``srank_few_rows`` [layer]: 1 below max(2048, 8 × width) rows.

    Raises:
        SettingsError: ``delta`` is no share.

    Source: Kumar et al. 2021, arXiv:2010.14498, section 3.
    """

    delta: float = 0.01

    name: ClassVar[str] = "srank"
    writes: ClassVar[Mapping[str, str]] = {**keys_of("srank"), "srank_few_rows": "layer"}
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "srank_few_rows": {
            0: "at least 2048 rows, and 8 a unit",
            1: "fewer than 2048 rows, or than 8 a unit: the value depends on how many",
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-6 < self.delta < 1:
            raise SettingsError(f"SRank needs delta between 1e-6 and 1, got {self.delta}")

    def rank(self, sigma: Tensor, rows: int) -> Tensor:  # noqa: ARG002 - the same for any number of rows
        """Add the largest until nearly all is there."""
        return srank(sigma, self.delta)

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Count the directions of every layer, and say for which there are few rows."""
        shapes = [value.shape for value in self.activations(seen, model)]
        few = [rows < max(_ENOUGH, _ENOUGH_A_UNIT * width) for rows, width in shapes]
        return super().measure(seen, model).set("srank_few_rows", torch.tensor(few, dtype=torch.int8))
