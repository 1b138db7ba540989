"""From which input positions attention carries something to each position at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from tensordict import TensorDict, TensorDictBase

from tdhook_train.errors import NetworkError, SettingsError
from tdhook_train.hooks import HookedModel
from tdhook_train.latent.attention_reading import AttentionReading
from tdhook_train.method import Seen
from tdhook_train.ops.attention import FUSIONS, fused, rolled_out

__all__ = ["AttentionRollout"]


@dataclass(frozen=True)
class AttentionRollout(AttentionReading):
    """How much of each position at the end comes from each at the beginning, through the attention of all layers.

    Of each layer's attention, heads brought together, half is replaced by the residual connection:
    ``Ã = ½ (A + I)``, rows made to sum to 1; the rollout is the product ``Ã_L ... Ã_1``. What lies between the layers
    counts as mixing no positions, and values as of one size.

    Costs and settings as for :class:`.AttentionReading`: one forward pass over at most ``rows`` rows.

    Args:
        fusion: how heads become one: their mean, as in the paper, their greatest or their least weight.

    Writes:
        ``rollout`` [batch, query, key]: shares, which sum to 1 over keys; NaN where a weight on the way is.

    Raises:
        NetworkError: no attention layer gives weights, or one attends from other positions than to (attention across
            two sequences, which cannot be multiplied); said when measured.

    Source: Abnar and Zuidema 2020, arXiv:2005.00928, section 3.
    """

    fusion: Literal["mean", "max", "min"] = "mean"

    writes: ClassVar[Mapping[str, str]] = {"rollout": "batch query key"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion not in FUSIONS:
            raise SettingsError(f"fusion={self.fusion!r} is none of {', '.join(map(repr, FUSIONS))}")

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Multiply the layers."""
        weights = self._weights(seen, model)
        shapes = {tuple(value.shape[-2:]) for value in weights.values()}
        if len(shapes) > 1 or any(queries != keys for queries, keys in shapes):
            given = ", ".join(f"{layer!r}: {list(value.shape[-2:])}" for layer, value in weights.items())
            raise NetworkError(
                f"AttentionRollout multiplies layers that attend among the same positions, and has [query, key] of "
                f"{given}; name the layers of self-attention with layers=..."
            )
        rollout = rolled_out([fused(value, self.fusion) for value in weights.values()])
        return TensorDict({"rollout": self._reduced(rollout)}, batch_size=[])
