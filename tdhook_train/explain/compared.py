"""Attributions that compare a value with a baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain.attribution import Attribution, one_of
from tdhook_train.explain.problem import Found, Point, Problem
from tdhook_train.keys import path_of
from tdhook_train.method import Seen
from tdhook_train.ops.blur import blurred

__all__ = ["Compared", "paired"]

_BASELINES = ("zero", "mean", "blur", "rows")
_BLUR = 5.0  # pixels


@dataclass(frozen=True)
class Compared(Attribution):
    """An attribution that compares each value with a baseline.

    ``("baseline", key)`` in the batch is the baseline of an input, row by row; with one dimension more, ``[row,
    reference, *feature]``, several references, over which shares are averaged. Of a layer, its value for these
    baseline inputs: the paired state. Where the batch has none:

    Args:
        baseline: zeros; the mean over the batch; images blurred (Gaussian, 5 pixels); or other rows of the batch,
            drawn at random, over which shares are averaged.
        references: how many rows are drawn for ``baseline="rows"``.
    """

    baseline: Literal["zero", "mean", "blur", "rows"] = "zero"
    references: int = 8

    one_by_one: ClassVar[bool] = True
    """Whether references are compared with one after another; where not, a problem has all, ``[row, reference, …]``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, baseline=_BASELINES)
        if self.references < 1:
            raise SettingsError(f"{type(self).__name__} needs references of 1 or more, got {self.references}")

    def posed(self, whole: Problem, point: Point, every: Point, seen: Seen, index: Tensor) -> Problem:
        """Add the baseline: ``[row, reference, *feature]``."""
        problem = super().posed(whole, point, every, seen, index)
        given = _given(problem, seen, index)
        baseline = {site: self._baseline(problem, site, every[site], given) for site in point}
        most = max(value.shape[1] for value in baseline.values())
        spread = {site: value.expand(-1, most, *value.shape[2:]) for site, value in baseline.items()}
        for site, mask in problem.mask.items():
            spread[site] = torch.where(mask[:, None], spread[site], point[site][:, None])
        return replace(problem, baseline=spread)

    def rows_at_once(self, problem: Problem) -> int:
        """Count each reference of a row."""
        return max(1, problem.at_once // next(iter(problem.baseline.values())).shape[1])

    def _shares(self, problem: Problem) -> Found:
        """Explain with each reference, and average."""
        if not self.one_by_one:
            return super()._shares(problem)
        count = next(iter(problem.baseline.values())).shape[1]
        index = torch.arange(len(problem), device=problem.device).repeat_interleave(count)
        repeated = problem.rows(index) if count > 1 else problem
        flat = {site: value.flatten(0, 1) for site, value in problem.baseline.items()}
        found = super()._shares(replace(repeated, baseline=flat))
        return found if count == 1 else {key: v.unflatten(0, (-1, count)).mean(1) for key, v in found.items()}

    def _baseline(self, problem: Problem, site: str, every: Tensor, given: Point) -> Tensor:
        """Return the references of one site, ``[row, reference, *feature]``."""
        value = problem.point[site]
        if site in given:
            reference = given[site]
            return reference[:, None] if reference.ndim == value.ndim else reference
        if not value.is_floating_point():
            raise SettingsError(
                f"{type(self).__name__}: {site!r} is {value.dtype}; give the batch what replaces it, "
                f"('baseline', {site!r})"
            )
        if self.baseline == "mean":
            return every.mean(0).expand_as(value)[:, None]
        if self.baseline == "blur":
            if value.ndim != 4:
                raise SettingsError(
                    f"{type(self).__name__}: baseline='blur' needs images; {site!r} has {value.ndim} dims"
                )
            return blurred(value, _BLUR)[:, None]
        if self.baseline == "rows":
            rows = problem.drawn(lambda g: torch.randint(len(every), (self.references,), generator=g))
            return every[rows]
        return torch.zeros_like(value)[:, None]


def _given(problem: Problem, seen: Seen, index: Tensor) -> Point:
    """Return the baselines that stand in the batch: of inputs as they are, of layers by a pass over these inputs."""
    keys = list(problem.point) if problem.place == "model" else list(problem.model.in_keys)
    read = {key: seen.batch.get(("baseline", *path_of(key)), None) for key in keys}
    found = {key: value[index] for key, value in read.items() if value is not None}
    if problem.place == "model" or not found:
        return found
    return paired(problem, found)


def paired(problem: Problem, inputs: Point) -> Point:
    """Return what the layers of a problem hold for other inputs, ``[row, *feature]``; the rest as it is."""
    batch = TensorDict({**problem.still, **inputs}, batch_size=[len(problem)])
    with problem.model.run(batch) as run:
        read = run.get if problem.place == "output" else run.get_input
        proxies = {site: read(str(site)) for site in problem.sites}
    return {site: proxy.resolve() for site, proxy in proxies.items()}
