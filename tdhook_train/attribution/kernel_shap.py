"""Shapley values of features, or groups of them, as the solution of a weighted regression."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain import Found, Problem
from tdhook_train.explain.perturbed import Perturbed, coalition_values
from tdhook_train.ops.surrogate import summing_surrogate

__all__ = ["KernelShap"]


@dataclass(frozen=True)
class KernelShap(Perturbed):
    """What each feature, or group of features, adds to an output, on average over the orders in which they come in.

    Of at most ``samples`` coalitions all are evaluated, and the Shapley values are exact; of more, ``samples`` are
    drawn for each row, each with its complement. Shares sum to ``F(x) - F(baseline)`` either way. A pass for each
    coalition (of many rows at once), whatever the number of targets.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.
        groups: see :class:`Perturbed`, as is ``patch``.
        samples: coalitions; with the default up to 11 groups are solved exactly.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each input key, or layer, in units of the target; all features
        of a group have what the group has.
        ``shares`` [batch, target, group] where groups are named; of layers ``("shares", path)``.

    Source: Lundberg and Lee 2017, arXiv:1705.07874; pairs of complements, Covert and Lee 2021, arXiv:2012.01536.
    """

    samples: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise SettingsError(f"KernelShap needs samples of 2 or more, got {self.samples}")

    def versions(self, groups: int) -> int:
        """Count the coalitions."""
        return min(2**groups, self.samples + 2)

    def explain(self, problem: Problem) -> Found:
        """Fit the values of coalitions by what their groups add."""
        kept, weight = self._coalitions(problem)
        values = coalition_values(problem, kept)
        gains = values.double() - values[:, :1].double()  # the first coalition is empty, the last one has all
        shares = summing_surrogate(kept.double(), gains, weight, gains[:, -1])
        return self.shared(shares.mT.to(values.dtype), problem)

    def _coalitions(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return coalitions, ``[version, group]`` or ``[row, version, group]``, and the weight of each version."""
        groups, device = problem.group_count, problem.device
        if 2**groups <= self.samples:
            kept = (torch.arange(2**groups, device=device)[:, None] >> torch.arange(groups, device=device)) % 2 == 1
            by_size = [0.0, *(_mass(groups, size) / comb(groups, size) for size in range(1, groups)), 0.0]
            return kept, torch.tensor(by_size, dtype=torch.float64, device=device)[kept.sum(1)]
        drawn = problem.drawn(lambda g: _drawn(groups, self.samples // 2, g))
        ends = torch.zeros(len(problem), 1, groups, dtype=torch.bool, device=device)
        kept = torch.cat([ends, drawn, ~drawn, ~ends], 1)
        weight = torch.ones(kept.shape[1], dtype=torch.float64, device=device)
        weight[[0, -1]] = 0
        return kept, weight


def _mass(groups: int, size: int) -> float:
    """What the Shapley kernel gives to all coalitions of one size: ``(m - 1) / (s (m - s))``."""
    return (groups - 1) / (size * (groups - size))


def _drawn(groups: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw coalitions by the Shapley kernel, ``[count, group]``: a size first, then which groups."""
    by_size = torch.tensor([_mass(groups, size) for size in range(1, groups)])
    size = 1 + torch.multinomial(by_size, count, replacement=True, generator=generator)
    order = torch.rand(count, groups, generator=generator).argsort(1)
    return order < size[:, None]
