"""The direction that gradient ascent finds, by how far apart two sides lie on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.latent.direction import Direction
from tdhook_train.ops.directions import between_means, unit

__all__ = ["GradientDirection"]

_SLOPE = 1e-3  # of log J over an angle, in radians, at which the search has arrived


@dataclass(frozen=True)
class GradientDirection(Direction):
    """Along which direction of a layer two sides lie farthest apart, found by gradient ascent.

    Adam climbs, from the difference of the means μ, Fisher's separation of the projections on a direction u of length
    1: J(u) = u·μ / √(uᵀSu), with S the covariance within the sides, to whose diagonal ``ridge`` times its mean is
    added. Ended early, ``steps=20`` say, it stays near the difference of the means; to its end it is Fisher's
    discriminant, S⁻¹μ. No pass of its own with labels, two without; ``folds + 1`` searches a layer, of ``steps``
    products of S with a vector: for 64 units some 30 ms each.

    Args:
        layers: see :class:`Direction`, as are ``concept`` and ``folds``.
        steps: of the ascent.
        lr: angle of the first steps, by Adam; it falls to 0 along a cosine.
        ridge: share of the mean variance within the sides that is added to each unit's.

    Writes:
        What :class:`Direction` does.

    Source: the measure, Fisher 1936, "The use of multiple measurements in taxonomic problems"; the ascent, Kingma and
    Ba 2014, arXiv:1412.6980.
    """

    steps: int = 200
    lr: float = 0.05
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise SettingsError(f"GradientDirection needs steps of 1 or more, got {self.steps}")
        for name in ("lr", "ridge"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingsError(f"GradientDirection needs {name} above 0, got {getattr(self, name)}")

    def found(self, x: Tensor, marks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Climb for all labellings at once."""
        mean, within = _moments(x, marks)  # [labelling, unit], [labelling, unit, unit]
        spread = within.diagonal(dim1=1, dim2=2)
        added = self.ridge * spread.mean(1, keepdim=True)
        # sides without any spread within them: every direction separates them without end, so by the means
        added = torch.where(added > 0, added, 1.0)
        within = within + torch.diag_embed(added.expand_as(spread))
        scale = within.diagonal(dim1=1, dim2=2).sqrt()
        mean, within = mean / scale, within / (scale[:, :, None] * scale[:, None, :])
        # J in units of their own spread: u = v / scale
        v, slope = self._climbed(unit(between_means(x, marks) * scale), mean, within)
        return unit(v / scale), slope < _SLOPE

    def _climbed(self, v: Tensor, mean: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the ascent ends, and how steep it is there, ``[labelling]``."""
        first = second = torch.zeros_like(v)
        for step in range(1, self.steps + 1):
            slope = _slope(v, mean, within)
            first, second = torch.lerp(slope, first, 0.9), torch.lerp(slope.square(), second, 0.999)
            stride = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            fall = (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2
            v = unit(v + self.lr * fall * stride)
        return v, torch.linalg.vector_norm(_slope(v, mean, within), dim=-1)


def _moments(x: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differences of the means and the covariances within the sides."""
    inside = marks.to(x)
    plus, minus = (side.T @ x / side.sum(0)[:, None] for side in (inside, 1 - inside))
    means = inside[..., None] * plus + (1 - inside)[..., None] * minus  # [row, labelling, unit]
    rest = (x[:, None] - means).movedim(1, 0)
    return plus - minus, rest.mT @ rest / len(x)


def _slope(v: Tensor, mean: Tensor, within: Tensor) -> Tensor:
    """Return ∇ log J at v of length 1: μ / v·μ - Sv / vᵀSv, at right angles to v."""
    pulled = (within @ v[..., None])[..., 0]
    climb = mean / _dot(v, mean) - pulled / _dot(v, pulled)
    return climb.nan_to_num(0.0, 0.0, 0.0)  # means that do not differ: nowhere to climb to


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
