"""What each input feature contributes to an output, along the straight path from a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain import Compared, Found, Point, Problem
from tdhook_train.explain.attribution import one_of
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of
from tdhook_train.ops.quadrature import RULES

__all__ = ["IntegratedGradients"]


@dataclass(frozen=True)
class IntegratedGradients(Compared):
    """How much each input feature contributes to an output, compared with a baseline.

    The contributions of all features sum to ``F(x) - F(baseline)`` up to the error of the quadrature, which is
    reported as ``delta``. All targets come from one forward pass over the path; each costs a backward pass.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.
        points: of the path.
        quadrature: which points and weights: Gauss-Legendre, or Riemann sums of midpoints, left or right ends, or
            trapezoids.
        rows_per_pass: at most so many points of paths go through the network at once.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in units of the target.
        ``delta`` [batch, target]: sum of the attributions less ``F(x) - F(baseline)``; of layers ``("delta", path)``.

    Source: Sundararajan et al. 2017, arXiv:1703.01365.
    """

    points: int = 50
    quadrature: Literal["gauss-legendre", "midpoint", "left", "right", "trapezoid"] = "gauss-legendre"
    rows_per_pass: int | None = None

    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature", "delta": "batch target"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("points", "rows_per_pass"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise SettingsError(f"IntegratedGradients needs {name} of 1 or more, got {given}")
        one_of(self, quadrature=tuple(RULES))

    def at_once(self, model: HookedModel) -> int:
        """Go by ``rows_per_pass``, where it is given."""
        return self.rows_per_pass or super().at_once(model)

    def explain(self, problem: Problem) -> Found:
        """Integrate the gradients of every target over the path."""
        attr = self._integrated(problem)
        total = sum(value.flatten(2).sum(2) if value.ndim > 2 else value for value in attr.values())
        rise = problem.values(problem.point) - problem.values(problem.baseline)
        return {("attr", *path_of(site)): value for site, value in attr.items()} | {"delta": total - rise}

    def _integrated(self, problem: Problem) -> Point:
        rows, device = len(problem), problem.device
        at, weights = (x.to(device) for x in RULES[self.quadrature](self.points))
        sums: dict[int, Point] = {}
        for chunk in torch.arange(len(at), device=device).split(max(1, problem.at_once // rows)):
            path = {site: _between(problem.baseline[site], end, at[chunk]) for site, end in problem.point.items()}
            index = torch.arange(rows, device=device).repeat(len(chunk))
            weight = weights[chunk].repeat_interleave(rows)
            for target, grads in enumerate(problem.gradients(path, index, weight)):
                parts = {site: grad.unflatten(0, (len(chunk), rows)).sum(0) for site, grad in grads.items()}
                known = sums.get(target)
                sums[target] = parts if known is None else {site: known[site] + part for site, part in parts.items()}
        way = {site: end - problem.baseline[site] for site, end in problem.point.items()}
        return {site: torch.stack([sums[i][site] * way[site] for i in range(len(sums))], 1) for site in way}


def _between(start: Tensor, end: Tensor, at: Tensor) -> Tensor:
    """The points of the path, ``[point * row, ...]``."""
    t = at.to(end.dtype).view(-1, *[1] * end.ndim)
    return (start + t * (end - start)).flatten(0, 1)
