"""What an output loses without the features that an attribution ranks first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tdhook_train.explain import Found
from tdhook_train.explain.binned import Binned

__all__ = ["Comprehensiveness"]


@dataclass(frozen=True)
class Comprehensiveness(Binned):
    """How much an output drops without the features with the largest shares, over several shares of all features.

    Mean over the bins of ``F(x) - F(x without the first features)``. High is good: what was needed is gone.
    Of a bin of 0, which the paper's sum begins with, nothing could be learnt: it is left out.

    Beside the attribution itself, a pass for each bin and target, and ``orders`` for each bin for chance.

    Args:
        of: see :class:`Judged`, as is ``reduction``.
        baseline: see :class:`Masked`, as are ``unit``, ``by`` and ``orders``.
        bins: shares of all units, between 0 and 1, each rounded up to whole units.

    Writes:
        ``comprehensiveness`` [batch, target], in units of the target; of layers ``("comprehensiveness", path)``.
        ``chance_comprehensiveness``: the mean over random orders.

    Source: DeYoung et al. 2020, arXiv:1911.03429.
    """

    keeps: ClassVar[Literal["first", "others"]] = "others"
    against_chance: ClassVar[tuple[str, ...]] = ("comprehensiveness",)
    writes: ClassVar[Mapping[str, str]] = {
        "comprehensiveness": "batch target",
        "chance_comprehensiveness": "batch target",
    }

    def score(self, curve: Tensor, whole: Tensor) -> Found:
        """Average over the bins."""
        return {"comprehensiveness": (whole[..., None] - curve).mean(-1)}
