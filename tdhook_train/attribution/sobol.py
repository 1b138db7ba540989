"""Which features, or groups of them, an output's variance under random masks comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from tdhook_train.errors import SettingsError
from tdhook_train.explain import Found, Problem
from tdhook_train.explain.perturbed import Perturbed, coalition_values

__all__ = ["Sobol"]


@dataclass(frozen=True)
class Sobol(Perturbed):
    """Share of an output's variance that is gone once a feature, or a group of features, is known: total-order indices.

    Features are mixed with a baseline by independent uniform shares in [0, 1], a scrambled Sobol sequence for each row.
    The total index of a group counts all its interactions, so that indices sum to 1 or more; 0 where the output does
    not vary. ``samples`` passes for each group, and ``samples`` more (of many rows at once), whatever the number of
    targets.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.
        groups: see :class:`Perturbed`, as is ``patch``.
        samples: points of the sequence; powers of 2 spread best.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer: a share of variance, without
        unit; all features of a group have what the group has.
        ``shares`` [batch, target, group] where groups are named; of layers ``("shares", path)``.

    Source: Fel et al. 2021, arXiv:2111.04138; the estimator, Jansen 1999, doi:10.1016/S0010-4655(98)00154-4.
    """

    samples: int = 32

    discrete: ClassVar[bool] = False  # there is nothing between two tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise SettingsError(f"Sobol needs samples of 2 or more, got {self.samples}")

    def versions(self, groups: int) -> int:
        """Count the masks."""
        return self.samples * (groups + 1)

    def explain(self, problem: Problem) -> Found:
        """Draw two masks, and give the first the second one's share of one group after another."""
        groups = problem.group_count
        if 2 * groups > SobolEngine.MAXDIM:
            raise SettingsError(f"Sobol needs at most {SobolEngine.MAXDIM // 2} groups, got {groups}: cut by patch=")
        first, second = problem.drawn(lambda g: _points(2 * groups, self.samples, g)).chunk(2, -1)
        here = coalition_values(problem, first)
        varied = here.double() - here[:, :1].double()  # what does not vary is exactly 0
        total = varied.var(1)[:, None]  # [row, 1, target]
        moved = torch.cat(list(self._moved(problem, first, second, here)), 1)  # [row, group, target]
        shares = torch.where(total > 0, moved / total, 0)
        return self.shared(shares.mT.to(here.dtype), problem)

    def _moved(self, problem: Problem, first: Tensor, second: Tensor, here: Tensor) -> Iterator[Tensor]:
        """Yield half the mean square of what a group's own share changes, some groups at a time."""
        every = torch.arange(problem.group_count, device=problem.device)
        for chunk in every.split(max(1, problem.at_once // (len(problem) * self.samples))):
            own = (chunk[:, None] == every)[:, None]  # [some groups, 1, group]
            mixed = torch.where(own, second[:, None], first[:, None])  # [row, some groups, sample, group]
            there = coalition_values(problem, mixed.flatten(1, 2)).unflatten(1, mixed.shape[1:3])
            yield (there.double() - here[:, None].double()).square().mean(2) / 2


def _points(dimensions: int, count: int, generator: torch.Generator) -> Tensor:
    return SobolEngine(dimensions, scramble=True, seed=generator.initial_seed()).draw(count)
