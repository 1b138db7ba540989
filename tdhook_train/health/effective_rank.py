"""How many directions a layer's representation really uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.method import Method, Seen
from tdhook_train.ops.units import as_rows

__all__ = ["EffectiveRank"]


@dataclass(frozen=True)
class EffectiveRank(Method):
    """How many directions of a layer's activations carry its spread: exp of the entropy of its singular values.

    ``exp(-Σ p log p)`` with ``p = σ / Σσ``, σ the singular values of the matrix rows × units. Orthonormal columns give
    the width, rank one gives 1, an all-zero layer is defined as 0. Costs no pass of its own; the singular values come
    from the Gram matrix in float64, which loses those below 1e-8 of the largest, and with them less than 1e-6 of the
    entropy.

    Args:
        layers: paths, patterns, module classes or predicates.

    Writes:
        ``effective_rank`` [layer]: of the activations as they are. ``effective_rank_centred`` [layer]: of the
        activations less their mean, which a large common offset does not hide.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """

    layers: Selection = "**"

    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {"effective_rank": "layer", "effective_rank_centred": "layer"}

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers."""
        return model.sites(self.layers)

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Take the entropy of the singular values of every layer, layers of one width together."""
        seen_at = {site: seen.values[site] for site in self.taps(model)}
        values = [as_rows(value, model.unit_axis(site, value)) for site, value in seen_at.items()]
        raw, centred = torch.empty(len(values), dtype=torch.float64), torch.empty(len(values), dtype=torch.float64)
        for width in {value.shape[1] for value in values}:
            index = [i for i, value in enumerate(values) if value.shape[1] == width]
            grams = torch.stack([_gram(values[i]) for i in index])  # [layer, raw or centred, width, width]
            raw[index], centred[index] = _effective_rank(grams).cpu().unbind(1)
        return TensorDict({"effective_rank": raw, "effective_rank_centred": centred}, batch_size=[])


def _gram(rows: Tensor) -> Tensor:
    """XᵀX of the activations and of the activations less their mean, in float64."""
    rows = rows.double()
    mean = rows.mean(0)
    spread = rows - mean
    centred = spread.T @ spread
    return torch.stack([centred + len(rows) * mean[:, None] * mean, centred])


def _effective_rank(gram: Tensor) -> Tensor:
    """Exp H(σ / Σσ) from XᵀX, one number a matrix of the batch."""
    finite = gram.isfinite().all(-1).all(-1)
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], gram, 0.0))
    floor = values.amax(-1, keepdim=True).clamp_min(0) * 1e-15  # below: rounding of the decomposition
    sigma = torch.where(values > floor, values, 0.0).sqrt()
    total = sigma.sum(-1, keepdim=True)
    p = sigma / torch.where(total > 0, total, 1.0)
    rank = torch.special.entr(p).sum(-1).exp()
    rank = torch.where(total[..., 0] > 0, rank, 0.0)
    return torch.where(finite, rank, torch.nan)
