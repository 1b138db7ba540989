"""The probes of a cross-validation, one a fold, with what they were fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["FoldProbes"]


@dataclass(frozen=True)
class FoldProbes:
    """What is needed to apply each fold's probe to the rows that the fold holds out.

    Args:
        score: mean over folds of the score on rows held out, ``[layer, target]``.
        reason: why a NaN, by the probe's legend, ``[layer, target]``.
        folds: fold of each row, ``[n]``; -1 where nothing can be held out.
        truth: the targets, ``[n, target]``, float64; of classes, the class itself and not its number.
        weights: of each layer, ``[target, fold, unit]``, of classes ``[target, fold, class, unit]``; NaN where there is
            no score.
        intercepts: of each layer, without the last dimension of ``weights``.
        classes: the classes of each target, ``[target, class]``, NaN beyond; None for quantities.
    """

    score: Tensor
    reason: Tensor
    folds: Tensor
    truth: Tensor
    weights: Sequence[Tensor]
    intercepts: Sequence[Tensor]
    classes: Tensor | None = None
