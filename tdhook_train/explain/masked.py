"""Metrics that replace the features with the largest shares first and see what becomes of the outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain.attribution import one_of
from tdhook_train.explain.judged import Baseline, JudgedByRow, compared, counted
from tdhook_train.explain.perturbed import coalition_values
from tdhook_train.explain.problem import Found, Point, Problem
from tdhook_train.hooks import HookedModel
from tdhook_train.method import Seen

__all__ = ["Masked"]


@dataclass(frozen=True)
class Masked(JudgedByRow):
    """A metric that takes the features in the order of their shares and puts a baseline in the place of some.

    The same is done in random orders, the mean of which is ``chance_...``: a score without it is no evidence.

    Args:
        baseline: what replaces features, see :class:`Compared`: that of the attribution by default (zeros where it has
            none), and what the batch gives as ``("baseline", key)``. Scores are averaged over several references.
        unit: what is replaced together: each feature alone, all channels of a pixel, all features of a token. Shares of
            a unit are added up. Of an attribution by groups, its groups.
        by: whether the order is that of shares with their signs, or of their magnitudes.
        orders: how many random orders each row is given.
    """

    baseline: Baseline | None = None
    unit: Literal["each", "pixel", "token"] = "each"
    by: Literal["share", "magnitude"] = "share"
    orders: int = 8

    keeps: ClassVar[Literal["first", "others"]] = "others"
    """Whether the features with the largest shares keep their values, or all others do."""

    against_chance: ClassVar[tuple[str, ...]] = ()
    """Which scores are also given of random orders, below ``chance_`` and their name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, unit=("each", "pixel", "token"), by=("share", "magnitude"))
        if self.baseline is not None:
            one_of(self, baseline=("zero", "mean", "blur", "rows"))
        counted(self, orders=self.orders)

    @abstractmethod
    def counts(self, free: Tensor) -> Tensor:
        """Say of how many units to judge, ``[row, version]``, where so many may be changed, ``[row]``."""

    @abstractmethod
    def score(self, curve: Tensor, whole: Tensor) -> Found:
        """Make scores, ``[row, order, ...]``, of outputs.

        Args:
            curve: outputs where so many units were replaced (or kept), ``[row, order, version]``.
            whole: where nothing was, ``[row, order]``.
        """

    def posed(self, seen: Seen, model: HookedModel) -> Iterator[Problem]:
        """Yield the problems with their baselines."""
        yield from compared(self.of, self.baseline).problems(seen, model)

    def versions(self, problem: Problem) -> int:
        """Count each reference of a row."""
        return next(iter(problem.baseline.values())).shape[1]

    def judge(self, problem: Problem, shares: Point) -> Found:
        """Replace units in the order of each target's shares, and in random orders."""
        references = self.versions(problem)
        index = torch.arange(len(problem), device=problem.device).repeat_interleave(references)
        problem = self._in_units(problem)
        scores, free = self._scores(problem, shares)
        flat = {site: value.flatten(0, 1) for site, value in problem.baseline.items()}
        problem = replace(replace(problem, baseline={}).rows(index), baseline=flat)
        scores, free, counts = scores[index], free[index], self.counts(free.sum(-1))[index]
        drawn = problem.drawn(lambda g: torch.rand(self.orders, free.shape[-1], generator=g))
        own = self._swept(problem, scores, free, counts).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        chance = self._swept(problem, drawn, free, counts).mean(1).movedim(1, 2)  # a score is linear in the curve
        curve, chance, whole = (
            value.unflatten(0, (-1, references)).mean(1) for value in (own, chance, problem.values(problem.point))
        )
        by_chance = self.score(chance, whole)
        return self.score(curve, whole) | {f"chance_{name}": by_chance[name] for name in self.against_chance}

    def _swept(self, problem: Problem, scores: Tensor, free: Tensor, counts: Tensor) -> Tensor:
        """Return all targets for each order of the units: ``[row, order, version, target]``."""
        scores = scores.masked_fill(~free[:, None], -torch.inf)
        ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        rows, versions, found = *counts.shape, []
        for rank in ranks.split(max(1, problem.at_once // (rows * versions)), 1):
            first = (rank[:, :, None] < counts[:, None, :, None]).flatten(1, 2)  # [row, order * version, unit]
            values = coalition_values(problem, first if self.keeps == "first" else ~first)
            found.append(values.unflatten(1, (-1, versions)))
        return torch.cat(found, 1)

    def _in_units(self, problem: Problem) -> Problem:
        """Number what is replaced together."""
        if problem.groups and self.unit == "each":
            return problem
        ids: Point = {}
        count, fits = 0, self.unit == "each"
        for site, value in problem.point.items():
            kept = _shape(tuple(value.shape[1:]), self.unit)
            fits = fits or kept != value.shape[1:]
            number = torch.arange(prod(kept), device=value.device).view(1, *kept) + count
            ids[site], count = number.expand_as(value), count + prod(kept)
        if not fits:
            shapes = {site: list(value.shape[1:]) for site, value in problem.point.items()}
            raise SettingsError(f"{type(self).__name__}: unit={self.unit!r} needs features of that kind, got {shapes}")
        return replace(problem, groups=ids, group_count=count)

    def _scores(self, problem: Problem, shares: Point) -> tuple[Tensor, Tensor]:
        """Return the share of each unit, ``[row, target, unit]``, and which may be changed, ``[row, unit]``."""
        rows, targets = len(problem), len(problem.names)
        ids = torch.cat([problem.groups[site].reshape(rows, -1) for site in shares], 1)
        flat = torch.cat([value.reshape(rows, targets, -1) for value in shares.values()], 2)
        masks = [
            problem.mask.get(site, torch.ones_like(value, dtype=torch.bool)).reshape(rows, -1)
            for site, value in problem.point.items()
        ]
        empty = flat.new_zeros(rows, targets, problem.group_count)
        totals = empty.scatter_add(2, ids[:, None].expand_as(flat), flat)
        members = torch.cat(masks, 1).to(flat.dtype)
        sizes = empty[:, 0].scatter_add(1, ids, members)
        if self.of_groups:  # each feature of a group has what the whole group has
            totals = totals / sizes.clamp(min=1)[:, None]
        return totals if self.by == "share" else totals.abs(), sizes > 0

    @property
    def of_groups(self) -> bool:
        """Whether the attribution gives every feature of a group the share of the group."""
        return hasattr(self.of, "groups") and self.unit == "each"


def _shape(features: tuple[int, ...], unit: str) -> tuple[int, ...]:
    """Say in which shape units are numbered: those of features, 1 along what is replaced together."""
    if unit == "pixel" and len(features) == 3:
        return (1, *features[1:])
    if unit == "token" and len(features) == 2:
        return (features[0], 1)
    return features
