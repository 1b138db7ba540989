"""A linear function of which features are there, fitted near the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain import Found, Problem
from tdhook_train.explain.attribution import one_of
from tdhook_train.explain.perturbed import Perturbed, coalition_values
from tdhook_train.ops.surrogate import ridge_surrogate

__all__ = ["Lime"]

_COSINE, _EUCLIDEAN = 0.25, 0.75  # the latter times the root of the number of groups


@dataclass(frozen=True)
class Lime(Perturbed):
    """How much an output rises where a feature, or a group of features, is there: a linear function fitted nearby.

    Coalitions are drawn for each row, each group kept with probability 1/2 (the first keeps all), weighted by how close
    they are to the whole input, and fitted by ridge regression, all targets at once. ``samples`` passes (of many rows
    at once), whatever the number of targets.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.
        groups: see :class:`Perturbed`, as is ``patch``.
        samples: coalitions.
        distance: between a coalition and that of all groups, as vectors of zeros and ones.
        kernel_width: ``s`` of the weight ``exp(-distance² / s²)``; by default 0.25 for the cosine distance, and 0.75
            times the root of the number of groups for the Euclidean one.
        alpha: penalty on the squared coefficients; 0 for none.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each input key, or layer, in units of the target; all features
        of a group have what the group has.
        ``r2`` [batch, target]: share of the weighted variance over coalitions that the linear function explains: 1
        where the output is linear nearby, NaN where it does not vary; of layers ``("r2", path)``.
        ``shares`` [batch, target, group] where groups are named; of layers ``("shares", path)``.

    Source: Ribeiro et al. 2016, arXiv:1602.04938.
    """

    samples: int = 500
    distance: Literal["cosine", "euclidean"] = "cosine"
    kernel_width: float | None = None
    alpha: float = 1.0

    writes: ClassVar[Mapping[str, str]] = {**Perturbed.writes, "r2": "batch target"}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, distance=("cosine", "euclidean"))
        if self.samples < 2:
            raise SettingsError(f"Lime needs samples of 2 or more, got {self.samples}")
        if self.kernel_width is not None and not self.kernel_width > 0:
            raise SettingsError(f"Lime needs kernel_width above 0, got {self.kernel_width}")
        if not (self.alpha >= 0 and isfinite(self.alpha)):
            raise SettingsError(f"Lime needs alpha of 0 or more, got {self.alpha}")

    def versions(self, groups: int) -> int:  # noqa: ARG002
        """Count the coalitions."""
        return self.samples

    def explain(self, problem: Problem) -> Found:
        """Fit the values of coalitions."""
        groups = problem.group_count
        kept = problem.drawn(lambda g: torch.rand(self.samples, groups, generator=g) < 0.5)
        kept[:, 0] = True
        values = coalition_values(problem, kept)
        y = values.double() - values[:, :1].double()  # what does not vary is exactly 0
        shares, r2 = ridge_surrogate(kept.double(), y, self._weight(kept.sum(2).double(), groups), self.alpha)
        return self.shared(shares.mT.to(values.dtype), problem) | {"r2": r2.to(values.dtype)}

    def _weight(self, size: Tensor, groups: int) -> Tensor:
        """Say how much coalitions of a size count."""
        if self.distance == "cosine":  # a·1 / (|a| |1|) = size / sqrt(size * groups)
            distance, width = 1 - (size / groups).sqrt(), self.kernel_width or _COSINE
        else:
            distance, width = (groups - size).sqrt(), self.kernel_width or _EUCLIDEAN * sqrt(groups)
        return torch.exp(-((distance / width) ** 2))
