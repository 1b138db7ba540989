"""What each unit of a layer contributes to the change of an output between two states of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain import Found, Point, Problem
from tdhook_train.explain.compared import paired
from tdhook_train.explain.integrated import Integrated
from tdhook_train.hooks import Selection
from tdhook_train.keys import path_of
from tdhook_train.method import Seen

__all__ = ["LayerIntegratedGradients"]


@dataclass(frozen=True)
class LayerIntegratedGradients(Integrated):
    """How much of the change that a layer's other state makes to an output each of its units makes.

    The layer goes from its value h in the base state to its value h' in the source state, in a straight line; all else
    stays as in the base state. Units sum to ``M(do h = h') - M(base)``, which in a chain of layers is
    ``M(source) - M(base)`` at every layer. To first order, what :class:`ActivationPatching` finds unit by unit, of all
    units at the cost of one: a forward pass over the path for each layer, and a backward pass for each target.

    The source state of a row is that of ``("source", key)`` in the batch; or the row itself, and its base state that of
    ``("baseline", key)``; or that of the row half the batch further on.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``side``, ``reduction`` and
            ``max_bytes``.
        layers: paths, patterns, module classes or predicates; every layer by default.
        points: see :class:`Integrated`, as are ``quadrature`` and ``rows_per_pass``.

    Writes:
        ``("attr", path)`` [batch, target, *feature] for each layer, in units of the target.
        ``("delta", path)`` [batch, target]: sum of the attributions less ``M(do h = h') - M(base)``.

    Source: Sundararajan et al. 2017, arXiv:1703.01365; between paired states, Hanna et al. 2024, arXiv:2403.17806.
    """

    layers: Selection | None = "**"

    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature", "delta": "batch target"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            raise SettingsError("LayerIntegratedGradients needs layers, got None; of inputs, use IntegratedGradients")

    def posed(self, whole: Problem, point: Point, every: Point, seen: Seen, index: Tensor) -> Problem:
        """Pair each row's state with another one."""
        problem = super().posed(whole, point, every, seen, index)
        source, base = (_given(seen, problem, name, index) for name in ("source", "baseline"))
        start, end = problem.point, problem.point
        if source:
            end = paired(problem, source)
        elif base:
            start, problem = paired(problem, base), replace(problem, still=problem.still | base)
        elif len(index) < 2:
            raise SettingsError(
                f"LayerIntegratedGradients pairs rows with each other and needs 2 or more, got {len(index)}"
            )
        else:
            end = {site: value.roll(len(value) // 2, 0) for site, value in start.items()}
        ends = {
            site: torch.where(problem.mask[site], value, start[site]) if site in problem.mask else value
            for site, value in end.items()
        }
        return replace(problem, point=ends, baseline=start)

    def explain(self, problem: Problem) -> Found:
        """Integrate the gradients of every target over the path."""
        return self.contributions(problem)


def _given(seen: Seen, problem: Problem, name: str, index: Tensor) -> Point:
    """Return the inputs of a paired state, of the rows that are explained, where the batch holds any."""
    read = {key: seen.batch.get((name, *path_of(key)), None) for key in problem.model.in_keys}
    return {key: value[index] for key, value in read.items() if value is not None}
