"""Values beside the ones that are explained, drawn for each row."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain.problem import Point, Problem

__all__ = ["drawn_at"]


def drawn_at(problem: Problem, samples: int, draw: Callable[..., Tensor]) -> Point:
    """Draw numbers for every feature at every site, ``[row, sample, *feature]``; 0 where a mask is False.

    Args:
        problem: whose values are to be moved.
        samples: how many of each row.
        draw: ``torch.randn`` or ``torch.rand``.

    Raises:
        SettingsError: a value is an integer, which cannot be moved by little.
    """
    for site, value in problem.point.items():
        if not value.is_floating_point():
            raise SettingsError(f"a metric that moves {site!r} needs floating-point numbers, got {value.dtype}")
    sizes = [value[0].numel() for value in problem.point.values()]
    # in one draw: a generator that began anew at each site would move equal sites alike
    flat = problem.drawn(lambda g: draw(samples, sum(sizes), generator=g))
    found: Point = {}
    for (site, value), part in zip(problem.point.items(), flat.split(sizes, -1), strict=True):
        moved = part.reshape(len(problem), samples, *value.shape[1:]).to(value.dtype)
        found[site] = moved * problem.mask[site][:, None] if site in problem.mask else moved
    return found
