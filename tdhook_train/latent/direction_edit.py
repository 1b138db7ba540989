"""A model some of whose layers are moved along a direction, held at a place on it, or kept off it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_train.edit import Edit
from tdhook_train.errors import SettingsError
from tdhook_train.explain.attribution import one_of
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.layout import laid_out_by, unit_axis
from tdhook_train.hooks.paths import Selector, selectors
from tdhook_train.hooks.place import ForEach
from tdhook_train.ops.by_layer import by_layer, of_layer, settled
from tdhook_train.ops.directions import unit

__all__ = ["DirectionEdit"]

_WAYS = ("add", "set", "project_out")


@dataclass(frozen=True)
class DirectionEdit(Edit):
    """What a model does when a layer's activations are moved along a direction, and nowhere else.

    At every position of an image or a sequence alike. No pass of its own: while it is prepared, every call of the model
    is edited; afterwards the model is as it was.

    Args:
        layers: paths, patterns, module classes or predicates; by default those that ``direction`` names.
        direction: a number for each unit, of any length but 0, for all layers; or one for each layer, by its path, as
            ``("direction", layer)`` of a measured direction holds them (``network.path`` where there are several
            networks).
        by: ``"add"`` the amount along the direction; ``"set"`` the projection on it to the amount, for every input;
            ``"project_out"``: to 0, as if the layer had not that direction.
        amount: in units of the activation; not for ``"project_out"``.

    Raises:
        SettingsError: a direction without length, or an amount that is missing; at the first call, a direction that
            does not fit its layer.

    Source: adding, Turner et al. 2023, arXiv:2308.10248; projecting out, Arditi et al. 2024, arXiv:2406.11717.
    """

    layers: Selection = "**"
    direction: Sequence[float] | Mapping[str, Sequence[float]] | TensorDictBase = ()
    by: Literal["add", "set", "project_out"] = "add"
    amount: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, by=_WAYS)
        direction = by_layer(self.direction)
        if not direction or not all(_is_direction(one) for one in direction.values()):
            raise SettingsError(
                f"DirectionEdit needs a number for each unit, not all of them 0, got {self.direction!r}"
            )
        if (self.by == "project_out") != (self.amount is None):
            said = "no amount" if self.by == "project_out" else "an amount"
            raise SettingsError(f"DirectionEdit with by={self.by!r} needs {said}, got {self.amount}")
        if self.amount is not None and not abs(self.amount) < float("inf"):
            raise SettingsError(f"DirectionEdit needs a finite amount, got {self.amount}")
        object.__setattr__(self, "direction", settled(direction))
        if self.layers == "**" and None not in direction:
            object.__setattr__(self, "layers", tuple(direction))

    def edits(self, model: HookedModel) -> Mapping[Selector, Any]:
        """Move every layer."""

        def moved(site: str, module: nn.Module) -> Any:
            direction = unit(torch.tensor(of_layer(by_layer(self.direction), site, model.name), dtype=torch.float64))
            return partial(self._moved, direction, site, laid_out_by(model.module, module))

        return dict.fromkeys(selectors(self.layers), ForEach(moved))

    def _moved(self, direction: Tensor, site: str, layout: nn.Module, value: Tensor) -> Tensor:
        axis = unit_axis(value, layout)
        if value.shape[axis] != len(direction):
            raise SettingsError(
                f"DirectionEdit: {site!r} has {value.shape[axis]} units, the direction {len(direction)}"
            )
        along = direction.to(value.device, value.dtype)
        last = value.movedim(axis, -1)
        here = 0.0 if self.by == "add" else (last @ along)[..., None]
        return (last + ((self.amount or 0.0) - here) * along).movedim(-1, axis)


def _is_direction(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(isinstance(one, float) for one in numbers) and any(numbers)
