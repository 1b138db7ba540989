"""Which input features an output reacts to: its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdhook_train.explain import Attribution, Found, Problem
from tdhook_train.explain.attribution import one_of
from tdhook_train.explain.here import gradients_here
from tdhook_train.keys import path_of

__all__ = ["Saliency"]


@dataclass(frozen=True)
class Saliency(Attribution):
    """How much an output changes with each input feature, to first order.

    One forward pass for all targets and layers, and one backward pass for each target.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        score: the gradient as it is, its absolute value (the paper's), or its square.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in units of the target by
        units of the feature.

    Source: Simonyan et al. 2013, arXiv:1312.6034.
    """

    score: Literal["signed", "absolute", "squared"] = "signed"

    moves: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, score=tuple(_SCORES))

    def explain(self, problem: Problem) -> Found:
        """Differentiate every target with respect to every floating input, or layer."""
        score = _SCORES[self.score]
        return {("attr", *path_of(site)): score(grad) for site, grad in gradients_here(problem).items()}


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "signed": torch.Tensor.clone,
    "absolute": torch.abs,
    "squared": torch.square,
}
