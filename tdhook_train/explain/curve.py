"""Curves of an output over the share of features that are replaced, or kept, and the area under them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_train.explain.judged import counted
from tdhook_train.explain.masked import Masked
from tdhook_train.explain.problem import Found
from tdhook_train.hooks import HookedModel
from tdhook_train.method import Seen
from tdhook_train.ops.join import Labels

__all__ = ["Curve"]


@dataclass(frozen=True)
class Curve(Masked):
    """A curve from no feature to all of them, in steps of equal shares.

    Args:
        steps: of the curve; after step s, ⌈s/steps⌉ of all units.
    """

    steps: int = 20

    against_chance: ClassVar[tuple[str, ...]] = ("auc", "normalised")
    writes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("auc", "normalised", "rise", "chance_auc", "chance_normalised"), "batch target"),
        "curve": "batch target share",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        counted(self, steps=self.steps)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Add the shares of features."""
        return {**super().labels(seen, model), "share": [step / self.steps for step in range(self.steps + 1)]}

    def counts(self, free: Tensor) -> Tensor:
        """Round the number of units up, as Python does with ``-(-a // b)``."""
        step = torch.arange(self.steps + 1, device=free.device)
        return -(-(free[:, None] * step) // self.steps)

    def score(self, curve: Tensor, whole: Tensor) -> Found:
        """Take the area by trapezoids, of the output and of the output relative to both ends."""
        none = curve[..., 0 if self.keeps == "first" else -1]
        auc, rise = (curve[..., 1:] + curve[..., :-1]).mean(-1) / 2, whole - none
        normalised = torch.where(rise == 0, torch.nan, (auc - none) / rise)
        return {"auc": auc, "normalised": normalised, "rise": rise, "curve": curve}

    def weights(self, found: Found) -> Mapping[NestedKey, Tensor]:
        """Count each row by its rise: a mean of ratios would go by rows in which nothing changes."""
        return dict.fromkeys(("normalised", "chance_normalised"), found["rise"].abs())
