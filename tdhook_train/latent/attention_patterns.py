"""What attention layers weigh, as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tensordict import NestedKey, TensorDict, TensorDictBase

from tdhook_train.hooks import HookedModel
from tdhook_train.latent.attention_reading import AttentionReading
from tdhook_train.method import Seen

__all__ = ["AttentionPatterns"]


@dataclass(frozen=True)
class AttentionPatterns(AttentionReading):
    """How much each head of each layer takes from every position, on some rows of the batch.

    Costs and settings as for :class:`.AttentionReading`: one forward pass over at most ``rows`` rows.

    Writes:
        ``("attention", layer)`` [batch, head, query, key]: after the softmax, masks counted; a query's weights sum to
        1, and are NaN where everything is masked or not finite. A further call of one module is ``layer@1`` and so on.

    Raises:
        NetworkError: no attention layer gives weights; said when measured.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2; reading it: Clark et al. 2019, arXiv:1906.04341.
    """

    writes: ClassVar[Mapping[str, str]] = {"attention": "batch head query key"}

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Heads and positions of different layers are told apart by the layer's name."""
        return tuple(name if name == "batch" else f"{key[-1]}.{name}" for name in super().dims(key, ndim))

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Keep the weights."""
        found = {("attention", layer): self._reduced(value) for layer, value in self._weights(seen, model).items()}
        return TensorDict(found, batch_size=[])
