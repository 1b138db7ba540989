"""Attributions by gradients at values with noise on them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain.attribution import Attribution
from tdhook_train.explain.problem import Found, Point, Problem
from tdhook_train.keys import path_of

__all__ = ["Moments", "Noisy", "noise_of", "refuse_unsampled", "slopes_at"]

_NOISE_STREAM = 1


@dataclass(frozen=True)
class Moments:
    """Mean of some numbers, and the sum of their squared distances from it.

    Args:
        count: of the numbers.
        mean: of each feature.
        spread: likewise.
    """

    count: int
    mean: Tensor
    spread: Tensor

    def with_more(self, values: Tensor) -> Moments:
        """Add numbers that lie along dimension 1."""
        more, mean = values.shape[1], values.mean(1)
        apart, count = mean - self.mean, self.count + more
        # Chan et al. 1983: M_ab = M_a + M_b + (m_b - m_a)² n_a n_b / n, which loses no digits as E[g²] - E[g]² does
        within = (values - mean[:, None]).square().sum(1)
        spread = self.spread + within + apart.square() * (self.count * more / count)
        return Moments(count, self.mean + apart * (more / count), spread)

    @property
    def variance(self) -> Tensor:
        """The mean squared distance from the mean."""
        return self.spread / self.count


@dataclass(frozen=True)
class Noisy(Attribution):
    """An attribution by gradients at noisy copies of the values, drawn for each row from a generator of its own.

    Args:
        samples: noisy copies of a row.
        noise: standard deviation of the noise, as a share of the range (largest less smallest number) of each input in
            each row. A row of equal numbers, or of one, gets none. Masked parts get none.
    """

    samples: int = 16
    noise: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unsampled(self)

    @abstractmethod
    def summary(self, gradients: Moments) -> Tensor:
        """Return the share of each feature, from the moments of its gradient over the noise."""

    def rows_at_once(self, problem: Problem) -> int:
        """Count each noisy copy of a row."""
        return max(1, problem.at_once // self.samples)

    def explain(self, problem: Problem) -> Found:
        """Differentiate every target at every noisy copy."""
        noise = noise_of(problem, self.samples, self.noise)
        copies = {site: value[:, None] + noise[site] for site, value in problem.point.items()}
        known: dict[int, dict[Any, Moments]] = {}
        for target, _, grads in slopes_at(problem, copies):
            seen = known.setdefault(target, {site: _none(grad) for site, grad in grads.items()})
            known[target] = {site: seen[site].with_more(grad) for site, grad in grads.items()}
        return {
            ("attr", *path_of(site)): torch.stack([self.summary(known[i][site]) for i in range(len(known))], 1)
            for site in problem.sites
        }


def slopes_at(problem: Problem, copies: Point) -> Iterator[tuple[int, Tensor, Point]]:
    """Yield the number of a target, those of some copies, and the gradients there, ``[row, copy, *feature]``.

    Args:
        problem: what is differentiated.
        copies: ``[row, copy, *feature]``, which go through the network within :attr:`Problem.at_once`.
    """
    rows, count = len(problem), next(iter(copies.values())).shape[1]
    for chunk in torch.arange(count, device=problem.device).split(max(1, problem.at_once // rows)):
        point = {site: value[:, chunk].flatten(0, 1) for site, value in copies.items()}
        index = torch.arange(rows, device=problem.device).repeat_interleave(len(chunk))
        for target, grads in enumerate(problem.gradients(point, index)):
            yield target, chunk, {site: grad.unflatten(0, (rows, len(chunk))) for site, grad in grads.items()}


def noise_of(problem: Problem, samples: int, share: float) -> Point:
    """Draw normal noise for copies of each value, ``[row, sample, *feature]``; none where the mask is False.

    Args:
        problem: whose values.
        samples: copies of a row.
        share: standard deviation, as a share of the range of a row's value.
    """
    sizes = [value[0].numel() for value in problem.point.values()]
    drawn = problem.drawn(lambda g: torch.randn(samples, sum(sizes), generator=g), _NOISE_STREAM)
    noise: Point = {}
    for (site, value), part in zip(problem.point.items(), drawn.split(sizes, 2), strict=True):
        flat = value.reshape(len(value), -1)
        deviation = share * (flat.amax(1) - flat.amin(1))  # section 3.1: σ / (x_max - x_min) is what is set
        noise[site] = (part.to(value.dtype) * deviation[:, None, None]).view(len(value), samples, *value.shape[1:])
        if site in problem.mask:
            noise[site] = noise[site] * problem.mask[site][:, None]
    return noise


def refuse_unsampled(method: Any) -> None:
    """Refuse settings that draw nothing, or noise of no size.

    Raises:
        SettingsError: names what is needed.
    """
    name = type(method).__name__
    if method.samples < 1:
        raise SettingsError(f"{name} needs samples of 1 or more, got {method.samples}")
    if not 0 <= method.noise < math.inf:
        raise SettingsError(f"{name} needs noise of 0 or more, a share of the range, got {method.noise}")


def _none(grad: Tensor) -> Moments:
    return Moments(0, torch.zeros_like(grad[:, 0]), torch.zeros_like(grad[:, 0]))
