"""A concept: a direction among the units of a layer, which gradients go through and which rows are labelled by."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.errors import NetworkError, SettingsError
from tdhook_train.ops.directions import between_means, by_logistic, unit
from tdhook_train.ops.targets import label_of, read

__all__ = ["CAVS", "Through", "along", "directions", "found", "given", "labelled", "marked"]

CAVS = ("mean-difference", "logistic")


class Through:
    """Leaves what a layer gives out as it is, and lets only the gradient along a direction go on from there.

    Args:
        direction: of length 1, ``[unit]``.
        axis: along which dimension of the layer's value its units lie.
    """

    def __init__(self, direction: Tensor, axis: int) -> None:
        self.direction, self.axis = direction, axis
        self.value: Tensor | None = None
        self.passed = 0

    def __call__(self, value: Tensor) -> Tensor:
        """Stand in the layer's way."""
        self.value = value
        if not (torch.is_grad_enabled() and value.requires_grad):
            return value.clone()
        return _Through.apply(value, self)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, through: Through) -> Tensor:
        ctx.through = through
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        through = ctx.through
        through.passed += 1
        direction = through.direction.to(gradient)
        last = gradient.movedim(through.axis, -1)
        return ((last @ direction)[..., None] * direction).movedim(-1, through.axis), None


def along(value: Tensor, direction: Tensor, axis: int) -> Tensor:
    """Return how far each row goes along a direction, ``[row]``: the mean over positions."""
    return (value.movedim(axis, -1) @ direction.to(value)).reshape(len(value), -1).mean(1)


def marked(batch: TensorDictBase, concept: Any, device: torch.device) -> Tensor:
    """Read which rows show a concept, ``[row]``; it may be none, or all.

    Raises:
        SettingsError: not one label a row.
    """
    marks = read(batch, concept)
    if marks.numel() != len(batch):
        raise SettingsError(f"concept {label_of(concept)!r} needs one label a row, has {tuple(marks.shape)}")
    return marks.reshape(len(batch)).bool().to(device)


def labelled(batch: TensorDictBase, concept: Any, device: torch.device) -> Tensor:
    """Read which rows show a concept, ``[row]``.

    Raises:
        SettingsError: none do, or all.
    """
    marks = marked(batch, concept, device)
    if marks.all() or not marks.any():
        raise SettingsError(
            f"concept {label_of(concept)!r} needs rows that show it and rows that do not; "
            f"{int(marks.sum())} of {len(marks)} do"
        )
    return marks


def found(x: Tensor, labels: Tensor, cav: Literal["mean-difference", "logistic"], c: float) -> tuple[Tensor, Tensor]:
    """Find directions from activations ``[row, unit]`` and labels ``[row, labelling]``.

    Returns:
        Unit directions ``[labelling, unit]``, and which fits converged, ``[labelling]``.
    """
    if cav == "mean-difference":
        return between_means(x, labels), labels.new_ones(labels.shape[1], dtype=torch.bool)
    return by_logistic(x, labels, c)


def directions(x: Tensor, labels: Tensor, cav: Literal["mean-difference", "logistic"], c: float) -> Tensor:
    """Return unit directions ``[labelling, unit]``, from ``[row, unit]`` and labels ``[row, labelling]``."""
    return found(x, labels, cav, c)[0]


def given(value: Any, width: int, where: str) -> Tensor:
    """Return somebody's direction at unit length.

    Raises:
        NetworkError: it does not fit the layer, or has no length.
    """
    direction = torch.as_tensor(value, dtype=torch.float64)
    if direction.shape != (width,):
        raise NetworkError(f"the concept's direction has {tuple(direction.shape)}; {where!r} has {width} units")
    if not direction.isfinite().all() or not direction.any():
        raise NetworkError(f"the concept's direction at {where!r} has no length")
    return unit(direction)
