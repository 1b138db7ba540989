"""How many directions of a layer are larger than a fixed size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.health.spectral import Spectral, keys_of
from tdhook_train.ops.spectrum import feature_rank

__all__ = ["FeatureRank"]


@dataclass(frozen=True)
class FeatureRank(Spectral):
    """How many directions of a layer's activations are larger than ε: the number of ``σ / √rows`` above it.

    By definition not free of scale: a layer whose activations shrink loses rank, with the same directions in use.
    ``σ / √rows`` does not depend on how many rows there are, up to sampling. Costs no pass of its own. The Gram matrix
    resolves σ to 3e-8 of the largest, so that nothing is lost as long as the largest ``σ / √rows`` is below 3e7 ε.

    Args:
        layers: see :class:`.Spectral`.
        epsilon: in units of the activation.

    Writes:
        ``feature_rank``, ``feature_rank_centred`` [layer]. ``feature_rank_pooled``, ``feature_rank_centred_pooled``:
        see :class:`.Spectral`.

    Raises:
        SettingsError: ``epsilon`` is not above 0.

    Source: Lyle et al. 2022, arXiv:2204.09560, definition of the feature rank in section 4.
    """

    epsilon: float = 0.01

    name: ClassVar[str] = "feature_rank"
    writes: ClassVar[Mapping[str, str]] = keys_of("feature_rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon > 0:
            raise SettingsError(f"FeatureRank needs epsilon above 0, got {self.epsilon}")

    def rank(self, sigma: Tensor, rows: int) -> Tensor:
        """Count the large ones."""
        return feature_rank(sigma, rows, self.epsilon)
