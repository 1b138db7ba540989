"""Shapley values of features, or groups of them, by the orders in which they come in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tdhook_train.errors import SettingsError
from tdhook_train.explain import Found, Problem
from tdhook_train.explain.perturbed import Perturbed, coalition_values

__all__ = ["ShapleySampling"]


@dataclass(frozen=True)
class ShapleySampling(Perturbed):
    """What each feature, or group of features, adds to an output, averaged over orders drawn at random.

    Unbiased, and its shares sum to ``F(x) - F(baseline)``; the error falls with the root of ``permutations``.
    ``permutations`` passes for each group but one (of many rows at once), whatever the number of targets. For few
    groups :class:`KernelShap` is exact.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.
        groups: see :class:`Perturbed`, as is ``patch``.
        permutations: orders drawn for each row.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each input key, or layer, in units of the target; all features
        of a group have what the group has.
        ``shares`` [batch, target, group] where groups are named; of layers ``("shares", path)``.

    Source: Castro et al. 2009, doi:10.1016/j.cor.2008.04.004; Strumbelj and Kononenko 2010.
    """

    permutations: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.permutations < 1:
            raise SettingsError(f"ShapleySampling needs permutations of 1 or more, got {self.permutations}")

    def versions(self, groups: int) -> int:
        """Count the coalitions on the way of every order."""
        return self.permutations * groups

    def explain(self, problem: Problem) -> Found:
        """Let the groups come in one by one, in every order."""
        rows, groups, orders = len(problem), problem.group_count, self.permutations
        rank = problem.drawn(lambda g: torch.rand(orders, groups, generator=g).argsort(1))  # [row, order, group]
        order, step = (  # of the coalitions on the way: all but the empty and the whole one, which all orders share
            x.flatten()
            for x in torch.meshgrid(
                torch.arange(orders, device=problem.device),
                torch.arange(1, groups, device=problem.device),
                indexing="ij",
            )
        )
        parts = [problem.values(problem.baseline)[:, None], problem.values(problem.point)[:, None]]
        first, last = (part[:, None].expand(-1, orders, -1, -1) for part in parts)
        way = [first, last]
        if groups > 1:
            found = [
                coalition_values(problem, rank[:, order[chunk]] < step[chunk][:, None])
                for chunk in torch.arange(len(order), device=problem.device).split(max(1, problem.at_once // rows))
            ]
            way.insert(1, torch.cat(found, 1).unflatten(1, (orders, groups - 1)))
        gains = torch.cat(way, 2).diff(dim=2)  # [row, order, rank, target]
        mine = gains.gather(2, rank[..., None].expand(-1, -1, -1, gains.shape[-1]))
        return self.shared(mine.mean(1).mT, problem)
