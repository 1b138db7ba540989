"""Attributions that integrate something over the straight path between two states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain.attribution import Attribution, one_of
from tdhook_train.explain.problem import Found, Point, Problem
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of
from tdhook_train.ops.quadrature import RULES

__all__ = ["Integrated", "Slopes", "summed"]

Slopes = Callable[[Point, Tensor, Tensor], Iterator[Point]]
"""What is integrated, target after target, of points of the path, the rows they are of, and their weights."""


@dataclass(frozen=True)
class Integrated(Attribution):
    """An attribution that integrates over a path, by a rule of quadrature.

    Args:
        points: of the path.
        quadrature: which points and weights: Gauss-Legendre, or Riemann sums of midpoints, left or right ends, or
            trapezoids.
        rows_per_pass: at most so many points of paths go through the network at once.
    """

    points: int = 50
    quadrature: Literal["gauss-legendre", "midpoint", "left", "right", "trapezoid"] = "gauss-legendre"
    rows_per_pass: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("points", "rows_per_pass"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise SettingsError(f"{type(self).__name__} needs {name} of 1 or more, got {given}")
        one_of(self, quadrature=tuple(RULES))

    def at_once(self, model: HookedModel) -> int:
        """Go by ``rows_per_pass``, where it is given."""
        return self.rows_per_pass or super().at_once(model)

    def integral(self, problem: Problem, start: Point, end: Point, slopes: Slopes) -> Point:
        """Integrate from one end of the path to the other: ``[row, target, *feature]`` for each site of the slopes.

        Args:
            problem: its rows, and how many go through the network at once.
            start: ``[row, *feature]``.
            end: likewise.
            slopes: ``[n, *feature]`` a target at n points of the path, each times its weight.
        """
        rows, device = len(problem), problem.device
        at, weights = (x.to(device) for x in RULES[self.quadrature](self.points))
        sums: dict[int, Point] = {}
        for chunk in torch.arange(len(at), device=device).split(max(1, problem.at_once // rows)):
            path = {site: _between(start[site], value, at[chunk]) for site, value in end.items()}
            index = torch.arange(rows, device=device).repeat(len(chunk))
            weight = weights[chunk].repeat_interleave(rows)
            for target, found in enumerate(slopes(path, index, weight)):
                parts = {site: slope.unflatten(0, (len(chunk), rows)).sum(0) for site, slope in found.items()}
                known = sums.get(target)
                sums[target] = parts if known is None else {site: known[site] + part for site, part in parts.items()}
        return {site: torch.stack([sums[i][site] for i in range(len(sums))], 1) for site in sums[0]}

    def contributions(self, problem: Problem) -> Found:
        """Return the share of each feature in the rise of the targets from the baseline, and what sums lack of it."""
        slopes = self.integral(problem, problem.baseline, problem.point, problem.gradients)
        way = {site: (end - problem.baseline[site])[:, None] for site, end in problem.point.items()}
        attr = {site: slopes[site] * step for site, step in way.items()}
        found: Found = {("attr", *path_of(site)): value for site, value in attr.items()}
        return found | {"delta": summed(attr) - problem.rise()}


def summed(attr: Point) -> Tensor:
    """Sum shares ``[row, target, *feature]`` over all features of all sites: ``[row, target]``."""
    return torch.stack([value.flatten(2).sum(2) if value.ndim > 2 else value for value in attr.values()]).sum(0)


def _between(start: Tensor, end: Tensor, at: Tensor) -> Tensor:
    """The points of the path, ``[point * row, ...]``."""
    t = at.to(end.dtype).view(-1, *[1] * end.ndim)
    return (start + t * (end - start)).flatten(0, 1)
