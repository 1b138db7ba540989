"""The normal of a logistic regression between two sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.latent.direction import Direction
from tdhook_train.ops.directions import by_logistic

__all__ = ["LogisticDirection"]


@dataclass(frozen=True)
class LogisticDirection(Direction):
    """Along which direction of a layer a linear read-out tells two sides apart.

    Logistic regression, fitted to convergence in float64. A direction to read along: it leans away from what varies
    alike on both sides, so steering along it may move a layer where it never is (see :class:`MeanDifferenceDirection`).
    No pass of its own with labels, two without; ``folds + 1`` fits a layer.

    Args:
        layers: see :class:`Direction`, as are ``concept`` and ``folds``.
        C: weight of the summed log-loss against ½‖w‖²; the intercept is not penalised. As in scikit-learn.

    Writes:
        What :class:`Direction` does.

    Source: Alain and Bengio 2016, arXiv:1610.01644; as a direction, Kim et al. 2018, arXiv:1711.11279.
    """

    C: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.C < float("inf"):
            raise SettingsError(f"LogisticDirection needs a positive weight of the loss, got C={self.C}")

    def found(self, x: Tensor, marks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - of other members
        """Fit."""
        return by_logistic(x, marks, self.C)
