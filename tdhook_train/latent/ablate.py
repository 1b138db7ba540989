"""A model some of whose units, or a whole layer of it, are held at a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from tdhook_train.edit import Edit
from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.layout import laid_out_by, unit_axis
from tdhook_train.hooks.paths import Selector, selectors
from tdhook_train.hooks.place import ForEach
from tdhook_train.ops.units import held

__all__ = ["Ablate"]


@dataclass(frozen=True)
class Ablate(Edit):
    """What a model does without some of its units: their activations are held at one value, for every input.

    No pass of its own: while it is prepared, every call of the model is ablated; afterwards the model is as it was.

    Args:
        layers: paths, patterns, module classes or predicates.
        units: which units (features; channels where a convolution, pooling or its activation gives them out); the whole
            layer by default.
        to: the value, or one for each unit: 0 for zero ablation, the units' means for mean ablation.

    Raises:
        SettingsError: no units, or as many values as units are needed; at the first call, a unit that a layer has not.

    Source: zero ablation Morcos et al. 2018, arXiv:1803.06959; mean ablation Wang et al. 2022, arXiv:2211.00593.
    """

    layers: Selection = "**"
    units: int | tuple[int, ...] | None = None
    to: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        units = (self.units,) if isinstance(self.units, int) else self.units
        for name, given in (("units", units), ("to", self.to)):
            object.__setattr__(self, name, tuple(given) if isinstance(given, list) else given)
        if units is not None and (not units or any(not isinstance(unit, int) or unit < 0 for unit in units)):
            raise SettingsError(f"Ablate needs units by number, 0 or more, got units={self.units!r}")
        if not all(isinstance(value, int | float) for value in (self.to if isinstance(self.to, tuple) else (self.to,))):
            raise SettingsError(f"Ablate needs numbers to hold units at, got to={self.to!r}")
        if isinstance(self.to, tuple) and units is not None and len(self.to) != len(units):
            raise SettingsError(f"Ablate needs a value for each of {len(units)} units, got {len(self.to)}")

    def edits(self, model: HookedModel) -> Mapping[Selector, Any]:
        """Hold the units of every layer."""
        of_layer = ForEach(lambda _site, module: partial(self._held, laid_out_by(model.module, module)))
        return dict.fromkeys(selectors(self.layers), of_layer)

    def _held(self, layout: nn.Module, value: Tensor) -> Tensor:
        axis = unit_axis(value, layout)
        width = value.shape[axis]
        units = range(width) if self.units is None else cast(tuple[int, ...], self.units)
        if max(units) >= width:
            raise SettingsError(f"Ablate: the layer has units 0 to {width - 1}, not {max(units)}")
        if isinstance(self.to, tuple) and len(self.to) != len(units):
            raise SettingsError(f"Ablate needs a value for each of {len(units)} units of the layer, got {len(self.to)}")
        return held(value, units, self.to, axis)
