"""How large the gradient of each layer is, and whether it keeps its direction from tick to tick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.health.gradients import OfGradients
from tdhook_train.hooks import HookedModel
from tdhook_train.method import Seen
from tdhook_train.ops.likeness import cosine
from tdhook_train.seen import row_before

__all__ = ["GradientNorms"]


@dataclass(frozen=True)
class GradientNorms(OfGradients):
    """How large the mean gradient over rows is with respect to each layer, and how much it turns between ticks.

    For norms of weights and updates see :class:`~tdhook_train.weights.WeightDistance`. Costs a forward pass, a backward
    pass a target, and on disk the size of the weights for each target in each row. On a ProbeSet both gradients of a
    cosine are those of the same states; on training batches they differ by the batch as well.

    Args:
        targets: see :class:`.OfGradients`, as are ``layers`` and ``rows``.

    Writes:
        ``gradient_norm`` [layer, target]: ‖∇‖ of the mean over rows, of the layer's weights as one vector.
        ``gradient_turn`` [layer, target]: the cosine with that of the row before; NaN at the first tick, where one is 0
        or not finite, and where the layer's weights have another size. ``gradient_norm_pooled``,
        ``gradient_turn_pooled`` [target]: likewise of the layers end to end. For the next tick ``("gradient",
        layer)`` [target, weight].

    Source: norms and directions of updates as in Lyle et al. 2023, arXiv:2303.01486.
    """

    looks_back: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = (
        "gradient_norm",
        "gradient_turn",
        "gradient_norm_pooled",
        "gradient_turn_pooled",
    )
    writes: ClassVar[Mapping[str, str]] = {
        "gradient_norm": "layer target",
        "gradient_turn": "layer target",
        "gradient_norm_pooled": "target",
        "gradient_turn_pooled": "target",
        "gradient": "target weight",
    }

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Weights of layers of different sizes are told apart by the layer's name."""
        return tuple(f"{key[-1]}.weight" if name == "weight" else name for name in super().dims(key, ndim))

    @torch.inference_mode(False)  # what is differentiated goes into a graph, which weights made in inference cannot
    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Differentiate the mean of each target, and compare with the row before."""
        of = self.weighted(seen, model)
        gradients = {name: value.detach().flatten(1).cpu() for name, value in of.gradients_of_mean().items()}
        now = {layer: torch.cat([gradients[name] for name in names], 1) for layer, names in of.layers.items()}
        row = row_before(seen, model)
        before = {layer: None if row is None else row.get(("gradient", layer), None) for layer in now}
        pairs = [(value.double(), _like(value, before[layer]).double()) for layer, value in now.items()]
        pairs.append((torch.cat([one for one, _ in pairs], 1), torch.cat([two for _, two in pairs], 1)))
        norms = torch.stack([torch.linalg.vector_norm(one, dim=1) for one, _ in pairs])
        turns = torch.stack([cosine(one, two) for one, two in pairs])
        found: dict[NestedKey, Tensor] = {
            "gradient_norm": norms[:-1],
            "gradient_turn": turns[:-1],
            "gradient_norm_pooled": norms[-1],
            "gradient_turn_pooled": turns[-1],
        }
        return TensorDict(found | {("gradient", layer): value for layer, value in now.items()}, batch_size=[])


def _like(now: Tensor, before: Tensor | None) -> Tensor:
    """NaN where there is nothing of that size before."""
    return torch.full_like(now, torch.nan) if before is None or before.shape != now.shape else before.to(now)
