"""A model some of whose layers have lost what an eraser takes away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_train.edit import Edit
from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.layout import laid_out_by, unit_axis
from tdhook_train.hooks.paths import Selector, selectors
from tdhook_train.hooks.place import ForEach
from tdhook_train.ops.by_layer import by_layer, of_layer, settled
from tdhook_train.ops.erasure import factors

__all__ = ["Erase"]


@dataclass(frozen=True)
class Erase(Edit):
    """What a model does when a fitted map, of :class:`Leace` say, has taken a concept from some of its layers.

    Made by ``Leace.edit(row)``, or :meth:`fitted`. At every position of an image or a sequence alike, in double
    precision. No pass of its own: while it is prepared, every call of the model is edited; afterwards the model is as
    it was.

    Args:
        layers: paths, patterns, module classes or predicates; by default those that have an eraser.
        erasers: by the layer's path (``network.path`` where there are several networks), one above the other: k
            directions that are read, k that are taken away by as much, and what is added, ``[2k + 1, unit]``.

    Raises:
        SettingsError: no erasers, or of another shape; at the first call, one that does not fit its layer.

    Source: Belrose et al. 2023, arXiv:2306.03819.
    """

    layers: Selection = "**"
    erasers: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        erasers = by_layer(self.erasers)
        if not erasers or None in erasers or not all(_is_eraser(one) for one in erasers.values()):
            raise SettingsError("Erase needs an eraser of [2k + 1, unit] numbers for each layer, by its path")
        object.__setattr__(self, "erasers", settled(erasers))
        if self.layers == "**":
            object.__setattr__(self, "layers", tuple(erasers))

    @classmethod
    def fitted(cls, found: TensorDictBase) -> Erase:
        """Return the edit by the maps x ↦ Px + b of some layers.

        Args:
            found: holds ``("projection", layer)`` [unit, unit] and ``("bias", layer)`` [unit]. Of several networks
                these stand below each one's name, and the edit is of all.

        Raises:
            SettingsError: it holds no maps, or of some layer NaN.
        """
        keys = [key for key in found.keys(True, True) if isinstance(key, tuple) and "projection" in key[:-1]]
        erasers = {}
        for key in keys:
            network, layer = key[: key.index("projection")], key[-1]
            projection = found.get(key).double()
            if not projection.isfinite().all():
                raise SettingsError(f"Erase needs finite maps; that of {layer!r} is not: `reason` says why")
            bias = found.get((*network, "bias", layer)).double()
            erasers[".".join((*network, layer))] = torch.cat([*factors(projection), bias[None]])
        if not erasers:
            raise SettingsError("Erase needs ('projection', layer) and ('bias', layer), as Leace writes them")
        return cls(erasers=erasers)

    def edits(self, model: HookedModel) -> Mapping[Selector, Any]:
        """Erase in every layer."""

        def erased(site: str, module: nn.Module) -> Any:
            eraser = torch.tensor(of_layer(by_layer(self.erasers), site, model.name), dtype=torch.float64)
            return partial(_erased, eraser, site, laid_out_by(model.module, module))

        return dict.fromkeys(selectors(self.layers), ForEach(erased))


def _erased(eraser: Tensor, site: str, layout: nn.Module, value: Tensor) -> Tensor:
    axis = unit_axis(value, layout)
    if value.shape[axis] != eraser.shape[1]:
        raise SettingsError(f"Erase: {site!r} has {value.shape[axis]} units, its eraser {eraser.shape[1]}")
    eraser = eraser.to(value.device)
    k = len(eraser) // 2
    along, taken, added = eraser[:k], eraser[k : 2 * k], eraser[-1]
    last = value.movedim(axis, -1).double()
    return (last - (last @ along.T) @ taken + added).to(value.dtype).movedim(-1, axis)


def _is_eraser(numbers: Any) -> bool:
    return (
        isinstance(numbers, tuple)
        and len(numbers) % 2 == 1
        and all(isinstance(row, tuple) and row and isinstance(row[0], float) for row in numbers)
    )
