"""Activations along a direction, and how fast they move over tokens or training steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError, did_you_mean
from tdhook_train.ops.directions import unit

__all__ = ["acceleration", "projection", "velocity"]

_Values = TypeVar("_Values", Tensor, TensorDictBase)


def projection(values: _Values, direction: Any) -> _Values:
    """Say how far values go along a direction.

    Args:
        values: ``[..., unit]``; or of several layers, by name, as the artifacts of a method hold them.
        direction: of any length but 0, ``[unit]`` or in any shape that broadcasts with the values (one for each step,
            say); by layer where the values are. NaN, as of a layer where no direction was found, gives NaN.

    Returns:
        ``[...]``, in units of the values, float64; by layer where the values are.

    Raises:
        SettingsError: a direction is missing, does not fit or has no length.

    Example:
        >>> projection(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.0, 5.0]))
        tensor([2., 4.], dtype=torch.float64)
    """
    if not isinstance(values, TensorDictBase):
        return _along(values, torch.as_tensor(direction), "")
    out: dict[Any, Tensor] = {}
    for layer, value in values.items():
        if layer not in direction.keys():  # noqa: SIM118 - a TensorDict has no other way
            raise SettingsError(
                f"projection needs a direction for {layer!r}{did_you_mean(str(layer), direction.keys())}"
            )
        out[layer] = _along(value, torch.as_tensor(direction[layer]), f" of {layer!r}")
    return TensorDict(out, batch_size=[])


def velocity(series: Any, steps: Sequence[float] | Tensor, *, dim: int = 0) -> Tensor:
    """Say how fast a series moves: its first derivative, by the step sizes as they are.

    Of the parabola through each value and its two neighbours; through the three outermost at the ends. Exact for
    parabolas, and off by the square of the step size otherwise. Of two values their difference.

    Args:
        series: values at the steps, along ``dim``; NaN spreads to its neighbours.
        steps: of each value, rising, in any distances: training steps, positions of tokens, seconds.
        dim: along which dimension the steps lie.

    Returns:
        In the shape of the series, a step, float64.

    Raises:
        SettingsError: fewer than 2 steps; not as many as values; steps that do not rise, or are not finite.

    Example:
        >>> velocity([0.0, 1.0, 9.0], [0, 1, 3])  # of x², at steps that are not even
        tensor([0., 2., 6.], dtype=torch.float64)
    """
    return _derivative(series, steps, dim, 1)


def acceleration(series: Any, steps: Sequence[float] | Tensor, *, dim: int = 0) -> Tensor:
    """Say how fast the velocity of a series changes: its second derivative, by the step sizes as they are.

    Of the parabola through each value and its two neighbours; at the ends that of the value next to it. Exact for
    parabolas at any step sizes. It magnifies noise: see :mod:`tdhook_train.emergence` for when something was learned.

    Args:
        series: values at the steps, along ``dim``; NaN spreads to its neighbours.
        steps: of each value, rising, in any distances: training steps, positions of tokens, seconds.
        dim: along which dimension the steps lie.

    Returns:
        In the shape of the series, a step and step, float64.

    Raises:
        SettingsError: fewer than 3 steps; not as many as values; steps that do not rise, or are not finite.

    Example:
        >>> acceleration([0.0, 1.0, 9.0], [0, 1, 3])  # of x²
        tensor([2., 2., 2.], dtype=torch.float64)
    """
    return _derivative(series, steps, dim, 2)


def _along(values: Tensor, direction: Tensor, where: str) -> Tensor:
    direction = direction.to(values.device, torch.float64)
    if not values.ndim or not direction.ndim or values.shape[-1] != direction.shape[-1]:
        raise SettingsError(
            f"projection needs a number for each unit; the direction{where} has {tuple(direction.shape)}, the values "
            f"{tuple(values.shape)}"
        )
    if (direction == 0).all(-1).any():
        raise SettingsError(f"projection needs a direction with a length; that{where} is 0")
    return (values.double() * unit(direction)).sum(-1)


def _derivative(series: Any, steps: Sequence[float] | Tensor, dim: int, order: int) -> Tensor:
    """Differentiate the polynomial through three neighbours."""
    name = "velocity" if order == 1 else "acceleration"
    value = torch.as_tensor(series).double()
    at = torch.as_tensor(list(steps) if isinstance(steps, range) else steps).to(value)
    if not value.ndim or at.ndim != 1 or len(at) != value.shape[dim]:
        raise SettingsError(f"{name} needs a step for each value, got {tuple(at.shape)} for {tuple(value.shape)}")
    if len(at) <= order:
        raise SettingsError(f"{name} needs {order + 1} steps or more, got {len(at)}")
    if not at.isfinite().all() or not (at[1:] > at[:-1]).all():
        raise SettingsError(f"{name} needs steps that rise, each once and finite, got {at.tolist()}")
    last = value.movedim(dim, -1)
    if len(at) == 2:
        return (last.diff() / at.diff()).expand_as(last).movedim(-1, dim)
    first = (torch.arange(len(at), device=at.device) - 1).clamp(0, len(at) - 3)
    places = first[:, None] + torch.arange(3, device=at.device)
    weights = _weights(at[places] - at[:, None], order)  # of the values at each step's three places
    return (last[..., places] * weights).sum(-1).movedim(-1, dim)


def _weights(x: Tensor, order: int) -> Tensor:
    """Return the derivative at 0 of each Lagrange polynomial of the places ``[step, 3]``."""
    second, third = x.roll(-1, 1), x.roll(-2, 1)
    below = (x - second) * (x - third)
    # l(t) = (t - b)(t - c) / (a - b)(a - c)
    return -(second + third) / below if order == 1 else 2 / below
