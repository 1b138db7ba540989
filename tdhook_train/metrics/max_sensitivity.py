"""How much an attribution changes when the input hardly does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain import Found, Point, Problem
from tdhook_train.explain.judged import JudgedByRow, counted
from tdhook_train.explain.moved import drawn_at
from tdhook_train.keys import path_of

__all__ = ["MaxSensitivity"]


@dataclass(frozen=True)
class MaxSensitivity(JudgedByRow):
    """Largest change of an attribution within a small neighbourhood: ``max ‖Φ(x + δ) - Φ(x)‖``, ``|δ_i| ≤ radius``.

    Costs ``samples`` further attributions. What an attribution draws itself is the same each time, so that only the
    move changes it.

    Args:
        of: see :class:`Judged`, as is ``reduction``.
        radius: of the neighbourhood, in units of the features.
        samples: how many moves are tried, uniform in the neighbourhood.

    Writes:
        ``sensitivity`` [batch, target], in units of the attribution. ``relative``: over ``‖Φ(x)‖``, NaN where it is 0.
        Of layers ``("sensitivity", path)`` and so on: then what the layer gives out is moved.

    Source: Yeh et al. 2019, arXiv:1901.09392, definition 3.1 and the experiments' radius and samples.
    """

    radius: float = 0.02
    samples: int = 10

    writes: ClassVar[Mapping[str, str]] = dict.fromkeys(("sensitivity", "relative"), "batch target")

    def __post_init__(self) -> None:
        super().__post_init__()
        counted(self, samples=self.samples)
        if not self.radius > 0:
            raise SettingsError(f"MaxSensitivity needs radius above 0, got {self.radius}")

    def versions(self, problem: Problem) -> int:  # noqa: ARG002 - the same for all
        """Count the samples of a row."""
        return self.samples

    def judge(self, problem: Problem, shares: Point) -> Found:
        """Explain moved rows as well."""
        rows = len(problem)
        index = torch.arange(rows, device=problem.device).repeat_interleave(self.samples)
        drawn = drawn_at(problem, self.samples, _uniform)
        point = {
            site: (value[:, None] + self.radius * drawn[site]).flatten(0, 1) for site, value in problem.point.items()
        }
        again = self.of.found(replace(problem.rows(index), point=point))
        changes = {
            site: again["attr", *path_of(site)].unflatten(0, (rows, -1)) - value[:, None]
            for site, value in shares.items()
        }
        moved = _lengths(changes, 3).amax(1)
        length = _lengths(shares, 2)
        return {"sensitivity": moved, "relative": torch.where(length > 0, moved / length, torch.nan)}


def _uniform(*size: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(*size, generator=generator) - 1


def _lengths(point: Point, dims: int) -> Tensor:
    """Return the norm over the features of all sites; ``dims`` come before them."""
    squares = [value.square().reshape(*value.shape[:dims], -1).sum(-1) for value in point.values()]
    return torch.stack(squares).sum(0).sqrt()
