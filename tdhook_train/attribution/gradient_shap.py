"""What each input feature contributes to an output, in the mean over references: expected gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_train.explain import Compared, Found, Point, Problem
from tdhook_train.explain.integrated import summed
from tdhook_train.explain.noisy import noise_of, refuse_unsampled, slopes_at
from tdhook_train.keys import path_of

__all__ = ["GradientShap"]

_PATH_STREAM = 2


@dataclass(frozen=True)
class GradientShap(Compared):
    """How much each input feature contributes to an output, in the mean over references and paths, by samples.

    What :class:`IntegratedGradients` gives in the mean over all references, estimated at one random point of the path
    from a random reference a sample: cheaper where references are many. Each reference is drawn as often as the next.
    A forward pass over the samples of each row for all targets, a backward pass over them for each target, and a
    forward pass over the references.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.
        samples: points of a row.
        noise: standard deviation of what is added to the end of each path, see :class:`Noisy`; none by default.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in units of the target.
        ``delta`` [batch, target]: sum of the attributions less ``F(x) - mean F(reference)``, which is the error of
        sampling (and what the noise changes); of layers ``("delta", path)``.

    Source: Lundberg and Lee 2017, arXiv:1705.07874; as expected gradients, Erion et al. 2019, arXiv:1906.10670.
    """

    samples: int = 16
    noise: float = 0.0

    one_by_one: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature", "delta": "batch target"}

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unsampled(self)

    def rows_at_once(self, problem: Problem) -> int:
        """Count each sample, or reference, of a row."""
        return max(1, problem.at_once // max(self.samples, _count(problem)))

    def explain(self, problem: Problem) -> Found:
        """Average gradient times way over samples."""
        start, way, at = self._paths(problem)
        path = {site: start[site] + _beside(at, step) * step for site, step in way.items()}
        sums: dict[int, Point] = {}
        for target, chunk, grads in slopes_at(problem, path):
            parts = {site: (grad * way[site][:, chunk]).sum(1) / self.samples for site, grad in grads.items()}
            known = sums.get(target)
            sums[target] = parts if known is None else {site: known[site] + part for site, part in parts.items()}
        attr = {site: torch.stack([sums[i][site] for i in range(len(sums))], 1) for site in way}
        found: Found = {("attr", *path_of(site)): value for site, value in attr.items()}
        return found | {"delta": summed(attr) - _rise(problem)}

    def _paths(self, problem: Problem) -> tuple[Point, Point, Tensor]:
        """Draw where paths begin, and their ways, ``[row, sample, *feature]``; and a place on each."""
        count = _count(problem)

        def draw(generator: torch.Generator) -> Tensor:
            rounds = -(-self.samples // count)
            turns = [torch.randperm(count, generator=generator) for _ in range(rounds)]
            at = torch.rand(self.samples, generator=generator, dtype=torch.float64)
            return torch.stack([torch.cat(turns)[: self.samples].double(), at])

        which, at = problem.drawn(draw, _PATH_STREAM).unbind(1)
        row = torch.arange(len(problem), device=problem.device)[:, None]
        noise = noise_of(problem, self.samples, self.noise)
        start = {site: references[row, which.long()] for site, references in problem.baseline.items()}
        return start, {site: problem.point[site][:, None] + noise[site] - start[site] for site in start}, at


def _count(problem: Problem) -> int:
    return next(iter(problem.baseline.values())).shape[1]


def _beside(at: Tensor, value: Tensor) -> Tensor:
    return at.to(value.dtype).view(*at.shape, *[1] * (value.ndim - 2))


def _rise(problem: Problem) -> Tensor:
    """Return ``F(x)`` less its mean over the references, ``[row, target]``."""
    count = _count(problem)
    index = torch.arange(len(problem), device=problem.device).repeat_interleave(count)
    references = {site: value.flatten(0, 1) for site, value in problem.baseline.items()}
    return problem.values(problem.point) - problem.values(references, index).unflatten(0, (-1, count)).mean(1)
