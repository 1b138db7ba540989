"""How much an output drops on the way of replacing features, those with the largest shares first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_train.explain import Found
from tdhook_train.explain.judged import counted
from tdhook_train.explain.masked import Masked

__all__ = ["Aopc"]


@dataclass(frozen=True)
class Aopc(Masked):
    """Area over the perturbation curve: mean drop of an output while features are replaced, most relevant first.

    ``1/(L+1) Σ_k F(x) - F(x without the first k·n units)``, k from 0 to L = ``steps``. High is good. In the paper
    what is replaced becomes random, here it becomes the baseline (``baseline="rows"`` is the nearest to it).

    Beside the attribution itself, ``steps`` passes for each target and ``orders`` × ``steps`` for chance.

    Args:
        of: see :class:`Judged`, as is ``reduction``.
        baseline: see :class:`Masked`, as are ``unit``, ``by`` and ``orders``.
        steps: how many times something is replaced.
        units_per_step: how many units at each.

    Writes:
        ``aopc`` [batch, target], in units of the target; of layers ``("aopc", path)``. ``chance_aopc``: the mean over
        random orders.

    Source: Samek et al. 2017, arXiv:1509.06321, eq. 12.
    """

    steps: int = 10
    units_per_step: int = 1

    against_chance: ClassVar[tuple[str, ...]] = ("aopc",)
    writes: ClassVar[Mapping[str, str]] = {"aopc": "batch target", "chance_aopc": "batch target"}

    def __post_init__(self) -> None:
        super().__post_init__()
        counted(self, steps=self.steps, units_per_step=self.units_per_step)

    def counts(self, free: Tensor) -> Tensor:
        """Go on by so many units at each step, as long as there are some."""
        return torch.minimum(torch.arange(self.steps + 1, device=free.device) * self.units_per_step, free[:, None])

    def score(self, curve: Tensor, whole: Tensor) -> Found:
        """Average the drops."""
        return {"aopc": (whole[..., None] - curve).mean(-1)}
