"""How wrong an attribution is about what happens when the input is moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain import Found, Point, Problem
from tdhook_train.explain.attribution import one_of
from tdhook_train.explain.judged import Baseline, JudgedByRow, compared, counted
from tdhook_train.explain.moved import drawn_at
from tdhook_train.hooks import HookedModel
from tdhook_train.method import Seen

__all__ = ["Infidelity"]


@dataclass(frozen=True)
class Infidelity(JudgedByRow):
    """Mean squared error of what an attribution says of perturbations I: ``E (I·Φ - (F(x) - F(x - I)))²``.

    0 for the gradient of a linear network. Its size goes by that of the output: ``relative`` divides by
    ``E (F(x) - F(x - I))²``, which is what an attribution of zeros would get: at 1 or above it says nothing.

    Beside the attribution itself, ``samples`` passes for all targets.

    Args:
        of: see :class:`Judged`, as is ``reduction``.
        unit: what the attribution gives: the change of the output per unit of a feature (a gradient), or the part of
            the output that a feature carries (integrated gradients, input × gradient), which is then divided by
            ``x - baseline``, 0 where these are the same.
        perturb: by normal noise in all features, or by putting the baseline in place of a random half of the features.
        noise: standard deviation, in units of the features.
        samples: how many perturbations of each row.
        baseline: that of the attribution by default (zeros where it has none); of several references, their mean.

    Writes:
        ``infidelity`` [batch, target], in squared units of the target; ``null``, that of zeros; ``relative``, their
        ratio, in the mean over rows that of the means. NaN where the output does not change. Of layers
        ``("infidelity", path)`` and so on.

    Source: Yeh et al. 2019, arXiv:1901.09392, definition 2.1.
    """

    unit: Literal["slope", "contribution"] = "slope"
    perturb: Literal["noise", "baseline"] = "noise"
    noise: float = 0.1
    samples: int = 32
    baseline: Baseline | None = None

    writes: ClassVar[Mapping[str, str]] = dict.fromkeys(("infidelity", "null", "relative"), "batch target")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, unit=("slope", "contribution"), perturb=("noise", "baseline"))
        if self.baseline is not None:
            one_of(self, baseline=("zero", "mean", "blur", "rows"))
        counted(self, samples=self.samples)
        if not self.noise > 0:
            raise SettingsError(f"Infidelity needs noise above 0, got {self.noise}")

    def posed(self, seen: Seen, model: HookedModel) -> Iterator[Problem]:
        """Yield the problems with their baselines."""
        yield from compared(self.of, self.baseline).problems(seen, model)

    def versions(self, problem: Problem) -> int:  # noqa: ARG002 - the same for all
        """Count the samples of a row."""
        return self.samples

    def weights(self, found: Found) -> Mapping[NestedKey, Tensor]:
        """Make the ratio one of means."""
        return {"relative": found["null"]}

    def judge(self, problem: Problem, shares: Point) -> Found:
        """Compare what was said of each perturbation with what happens."""
        rows = len(problem)
        way = {site: value - problem.baseline[site].mean(1) for site, value in problem.point.items()}
        slopes = shares
        if self.unit == "contribution":
            slopes = {
                site: torch.where(way[site][:, None] == 0, 0, v / way[site][:, None]) for site, v in shares.items()
            }
        moves = self._moves(problem, way)
        moved = {site: (value[:, None] - moves[site]).flatten(0, 1) for site, value in problem.point.items()}
        index = torch.arange(rows, device=problem.device).repeat_interleave(self.samples)
        change = problem.values(problem.point)[:, None] - problem.values(moved, index).unflatten(0, (rows, -1))
        said = sum(
            moves[site].reshape(rows, self.samples, -1) @ slopes[site].reshape(rows, change.shape[-1], -1).mT
            for site in moves
        )
        infidelity, null = (said - change).square().mean(1), change.square().mean(1)
        return {"infidelity": infidelity, "null": null, "relative": torch.where(null > 0, infidelity / null, torch.nan)}

    def _moves(self, problem: Problem, way: Point) -> Point:
        """Draw the perturbations I, ``[row, sample, *feature]``; 0 where a mask is False."""
        if self.perturb == "noise":
            drawn = drawn_at(problem, self.samples, torch.randn)
            return {site: self.noise * value for site, value in drawn.items()}
        drawn = drawn_at(problem, self.samples, torch.rand)
        return {site: (value > 0.5) * way[site][:, None] for site, value in drawn.items()}
