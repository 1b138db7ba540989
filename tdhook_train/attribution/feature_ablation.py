"""What an output loses without a feature, or a group of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tdhook_train.explain import Found, Problem
from tdhook_train.explain.perturbed import Perturbed, coalition_values

__all__ = ["FeatureAblation"]


@dataclass(frozen=True)
class FeatureAblation(Perturbed):
    """How much an output drops when a feature, or a group of features, is replaced by a baseline.

    A pass for each group of features (of many rows at once), whatever the number of targets.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.
        groups: see :class:`Perturbed`, as is ``patch``.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each input key, or layer, in units of the target; all features
        of a group have what the group has.
        ``shares`` [batch, target, group] where groups are named; of layers ``("shares", path)``.

    Source: Zeiler and Fergus 2013, arXiv:1311.2901; as feature ablation, Kokhlikyan et al. 2020, arXiv:2009.07896.
    """

    def explain(self, problem: Problem) -> Found:
        """Leave out one group after another."""
        without = ~torch.eye(problem.group_count, dtype=torch.bool, device=problem.device)
        whole = problem.values(problem.point)[:, None]
        return self.shared((whole - coalition_values(problem, without)).movedim(1, 2), problem)
