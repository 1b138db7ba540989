"""Concept activation vectors, with what their accuracy must be held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain.attribution import one_of
from tdhook_train.explain.concept import CAVS, found
from tdhook_train.latent.direction import Direction
from tdhook_train.method import Seen
from tdhook_train.ops.folds import circular_shifts, in_blocks
from tdhook_train.ops.separation import Scores

__all__ = ["Cav"]


@dataclass(frozen=True)
class Cav(Direction):
    """The direction of a concept in each layer, and whether it says more than directions of labels without a meaning.

    What :class:`~tdhook_train.attribution.Tcav` takes derivatives along. The accuracy on rows held out stands beside
    that of as many directions again, found and scored in the same way from labels that mean nothing: turned in time
    within each trajectory, where rows are whole trajectories in order; drawn anew over the rows, where these count as
    independent; of a contrast, with the sides of each row swapped or not, by chance.

    No pass of its own with labels, two without; ``(1 + nulls) · folds + 1`` fits a layer.

    Args:
        layers: see :class:`Direction`, as are ``concept`` and ``folds``.
        cav: the normal of a logistic regression, or the difference of the means.
        C: weight of the summed log-loss of the regression against ½‖w‖².
        nulls: how many labellings without a meaning; 19 are the fewest for a one-sided test at 5 %. 0 for none.

    Writes:
        What :class:`Direction` does. Beside it ``null`` [layer, draw]: accuracies of the labels that mean nothing.
        ``p_value`` [layer]: share of all of these at or above the accuracy, itself counted. ``null_reason``:
        why a NaN (see ``legend``).

    Source: Kim et al. 2018, arXiv:1711.11279.
    """

    cav: Literal["mean-difference", "logistic"] = "logistic"
    C: float = 1.0
    nulls: int = 19

    writes: ClassVar[Mapping[str, str]] = {
        **Direction.writes,
        "null": "layer draw",
        "p_value": "layer",
        "null_reason": "layer",
    }
    shown: ClassVar[tuple[str, ...] | None] = (*(Direction.shown or ()), "p_value")
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        **Direction.legend,
        "null_reason": {
            0: "scored",
            1: "the accuracy itself is NaN",
            2: "rows are not whole trajectories in time order",
            3: "no labels without a meaning were asked for",
            4: "each trajectory has one label throughout, so turning it changes nothing",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, cav=CAVS)
        if not 0 < self.C < float("inf"):
            raise SettingsError(f"Cav needs a positive weight of the loss, got C={self.C}")
        if self.nulls < 0:
            raise SettingsError(f"Cav needs nulls of 0 or more, got {self.nulls}")

    def found(self, x: Tensor, marks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Subtract the means, or fit."""
        return found(x, marks, self.cav, self.C)

    def _labellings(self, marks: Tensor, seen: Seen) -> Tensor:
        if self._no_null(seen):
            return marks[:, None]
        generator = torch.Generator().manual_seed(0) if seen.generator is None else seen.generator
        if self.concept is None:
            half = len(marks) // 2
            swapped = torch.rand(self.nulls, half, generator=generator, device=generator.device) < 0.5
            drawn = torch.cat([swapped, ~swapped], 1).to(marks.device)
        elif not _independent(seen.groups):
            drawn = marks[circular_shifts(cast(Tensor, seen.groups).cpu(), self.nulls, generator).to(marks.device)]
            if (drawn == marks).all():
                return marks[:, None]
        else:
            orders = [
                torch.randperm(len(marks), generator=generator, device=generator.device) for _ in range(self.nulls)
            ]
            drawn = marks[torch.stack(orders).to(marks.device)]
        return torch.cat([marks[:, None], drawn.T], 1)

    def _written(self, scores: Sequence[Scores], seen: Seen) -> dict[NestedKey, Tensor]:
        accuracy = torch.stack([one.accuracy for one in scores])  # [layer, labelling]
        why = self._no_null(seen) or (4 if accuracy.shape[1] == 1 else 0)
        score = accuracy[:, :1]
        null = score.new_full((len(scores), self.nulls), torch.nan) if why else accuracy[:, 1:]
        p_value = (1 + (null >= score).sum(1)) / (1 + null.isfinite().sum(1).double())
        known = score[:, 0].isfinite() & null.isfinite().any(1)
        reason = torch.where(known, 0, why or 1)
        return {
            **super()._written(scores, seen),
            "null": null.clone(),
            "p_value": torch.where(known, p_value, torch.nan),
            "null_reason": reason.to(torch.int8),
        }

    def _no_null(self, seen: Seen) -> int:
        """Say why there is no null, by the codes of ``null_reason``; 0 where there is one."""
        if not self.nulls:
            return 3
        if self.concept is None or _independent(seen.groups):
            return 0
        return 0 if seen.ordered and in_blocks(cast(Tensor, seen.groups)) else 2


def _independent(groups: Tensor | None) -> bool:
    """Whether every row is a trajectory of its own, or none are known."""
    return groups is None or len(groups.unique()) == len(groups)
