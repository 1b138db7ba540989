"""The targets of a probe that is fitted fold by fold, and why some cannot be scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdhook_train.ops.classification import classes_of
from tdhook_train.ops.held_out import varying
from tdhook_train.ops.ridge import constant

__all__ = ["FoldedTargets", "was_scored"]


def was_scored(reason: Tensor) -> Tensor:
    """Whether a code of ``reason`` says that there is a score."""
    return (reason == 0) | (reason == 7)


@dataclass(frozen=True)
class FoldedTargets:
    """Targets side by side, and why some cannot be scored.

    Args:
        y: ``[n, target]``, float64: quantities, or the numbers of classes; zero where they are not finite.
        folds: fold of each row, ``[n]``; None where there is one trajectory.
        classes: of each target; 0 for quantities.
        reason: by the probes' legend, ``[target]``.
        fitted: whether a fold can be predicted from the others, ``[f, target]``.
        used: whether its score counts as well, ``[f, target]``.
    """

    y: Tensor
    folds: Tensor | None
    classes: Tensor
    reason: Tensor
    fitted: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    used: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))

    @classmethod
    def of(cls, values: Mapping[str, Tensor], folds: Tensor | None, whose: str) -> FoldedTargets:
        """Read targets as classes, for the probe ``whose``, or as quantities where it is empty."""
        given = [value.detach().cpu() for value in values.values()]
        if whose:
            classes = torch.tensor([len(classes_of(n, v, whose)) for n, v in zip(values, given, strict=True)])
            given = [value.unique(return_inverse=True)[1] for value in given]
        else:
            classes = torch.zeros(len(given), dtype=torch.int64)
        y = torch.stack([value.double() for value in given], 1)
        finite = y.isfinite().all(0)
        y = torch.where(finite, y, 0.0)
        if folds is None:
            return cls(y, None, classes, torch.full((len(given),), 3, dtype=torch.int8))
        fitted = torch.stack([_in_all_other_folds(y[:, t], folds, int(k)) for t, k in enumerate(classes)], 1)
        used = fitted & varying(y, folds)
        reason = torch.where(used.all(0), 0, torch.where(used.any(0), 7, 2))
        reason = torch.where(constant(y), 1, reason)
        return cls(y, folds, classes, torch.where(finite, reason, 5).to(torch.int8), fitted, used)

    def alike(self) -> Iterator[tuple[int, list[int]]]:
        """Gather the targets with as many classes and the same folds; a first one and all of them."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for t in was_scored(self.reason).nonzero()[:, 0].tolist():
            key = int(self.classes[t]), *self.fitted[:, t].tolist(), *self.used[:, t].tolist()
            groups.setdefault(key, []).append(t)
        yield from ((group[0], group) for group in groups.values())


def _in_all_other_folds(y: Tensor, folds: Tensor, classes: int) -> Tensor:
    """Whether the rows outside a fold have all classes (of 0 always): ``[f]``."""
    count = range(int(folds.max()) + 1)
    return torch.tensor([classes == 0 or len(y[folds != fold].unique()) == classes for fold in count])
