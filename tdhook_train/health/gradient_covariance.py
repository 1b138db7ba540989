"""Whether what one state teaches helps the others or undoes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.health.gradients import OfGradients, Weighted
from tdhook_train.hooks import HookedModel
from tdhook_train.method import Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.units import evenly_spaced

__all__ = ["GradientCovariance"]


@dataclass(frozen=True)
class GradientCovariance(OfGradients):
    """How much the gradients of single states point the same way: the cosine of each with each, over all weights.

    Near 1 everywhere: the network gives all states the same update, as where its features have collapsed. Near 0: each
    state is learnt by itself. Negative: one undoes another. Costs a forward pass and a backward pass a target of
    ``rows`` rows, as a batch where ``torch.func`` can run the network so, and otherwise a pass back for each state.

    Args:
        targets: see :class:`.OfGradients`, as are ``layers`` and ``rows``. Of the network's own loss, say.
        max_bytes: bound on the memory of the gradients, in bytes. Beyond it they are computed block by block, several
            times over.

    Writes:
        ``gradient_cosine`` [target, row, other_row]: NaN for a row whose gradient is 0 or not finite.
        ``gradient_cosine_mean``, ``gradient_cosine_negative`` [target]: the mean over pairs of different rows, and the
        share of pairs below 0; NaN with ``gradient_reason`` where there is no pair (see ``legend``).
        ``sample_gradient_norm`` [layer, target]: mean over rows of the norm of a single row's gradient.
        ``sample_gradient_norm_pooled`` [target]: likewise of all layers as one vector.

    Source: Lyle et al. 2023, arXiv:2303.01486, gradient covariance.
    """

    max_bytes: int = 2**28

    shown: ClassVar[tuple[str, ...]] = ("gradient_cosine_mean", "gradient_cosine_negative", "sample_gradient_norm")
    writes: ClassVar[Mapping[str, str]] = {
        "gradient_cosine": "target row other_row",
        "gradient_cosine_mean": "target",
        "gradient_cosine_negative": "target",
        "gradient_reason": "target",
        "sample_gradient_norm": "layer target",
        "sample_gradient_norm_pooled": "target",
    }
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "gradient_reason": {0: "measured", 1: "no two rows have gradients that are finite and not 0"}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_bytes < 1:
            raise SettingsError(f"GradientCovariance needs max_bytes of 1 or more, got {self.max_bytes}")

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The rows as well."""
        rows = evenly_spaced(len(seen.batch), self.rows).tolist()
        return super().labels(seen, model) | {"row": rows, "other_row": list(rows)}

    @torch.inference_mode(False)  # what is differentiated goes into a graph, which weights made in inference cannot
    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Compare each gradient with each."""
        inner, squares = self._products(self.weighted(seen, model), len(self.labels(seen, model)["target"]))
        length = inner.diagonal(dim1=1, dim2=2).sqrt()
        length = torch.where(length.isfinite() & (length > 0), length, torch.nan)
        cosine = (inner / (length[:, :, None] * length[:, None])).clamp(-1, 1)
        pairs = cosine.masked_fill(torch.eye(cosine.shape[1], dtype=torch.bool, device=cosine.device), torch.nan)
        known = (~pairs.isnan()).sum((1, 2))
        found = {
            "gradient_cosine": cosine.float(),
            "gradient_cosine_mean": pairs.nansum((1, 2)) / known,  # 0 / 0 where there is no pair
            "gradient_cosine_negative": (pairs < 0).sum((1, 2)) / known,
            "gradient_reason": (known == 0).to(torch.int8),
            "sample_gradient_norm": squares.sqrt().mean(-1),
            "sample_gradient_norm_pooled": inner.diagonal(dim1=1, dim2=2).sqrt().mean(-1),
        }
        return TensorDict({key: value.cpu() for key, value in found.items()}, batch_size=[])

    def _products(self, of: Weighted, targets: int) -> tuple[Tensor, Tensor]:
        """Return inner products ``[target, row, other]``, and ‖gradient‖² of each layer ``[layer, target, row]``."""
        size = sum(weight.numel() * weight.element_size() for weight in of.weights.values())
        blocks = torch.arange(len(of)).split(max(1, self.max_bytes // (4 * size * targets)))  # two, and in float64
        first = next(iter(of.weights.values()))
        inner = first.new_zeros(targets, len(of), len(of), dtype=torch.float64)
        squares = first.new_zeros(len(of.layers), targets, len(of), dtype=torch.float64)
        for i, rows in enumerate(blocks):
            one = _flat(of.gradients(rows))
            for j, names in enumerate(of.layers.values()):
                squares[j, :, rows] = torch.stack([one[name].square().sum(-1) for name in names]).sum(0).mT
            for others in blocks[i:]:
                two = one if others is rows else _flat(of.gradients(others))
                block = torch.stack([torch.einsum("atw,btw->tab", one[name], two[name]) for name in one]).sum(0)
                inner[:, rows[:, None], others] = block
                inner[:, others[:, None], rows] = block.mT
        return inner, squares


def _flat(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().flatten(2).double() for name, value in gradients.items()}
