"""Conditional relevance: only what passes chosen units, or a direction, of a layer goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError

__all__ = ["Condition", "conditions"]


@dataclass(frozen=True)
class Condition:
    """What of a layer's relevance goes on.

    Args:
        chosen: numbers of units or channels (whole numbers), or a direction (floats, one for each unit).

    Source: Achtibat et al. 2022, arXiv:2206.03208; of directions, Dreyer et al. 2023, arXiv:2308.09437.
    """

    chosen: tuple[int, ...] | tuple[float, ...]

    def kept(self, relevance: Tensor, value: Tensor, axis: int) -> Tensor:
        """Keep what goes on.

        Args:
            relevance: of what the layer gives out.
            value: what it gives out.
            axis: along which its units lie.
        """
        shape = [-1, *[1] * (value.ndim - 1 - axis)]
        if isinstance(self.chosen[0], int):
            keep = torch.zeros(value.shape[axis], dtype=torch.bool, device=value.device)
            keep[list(self.chosen)] = True
            return torch.where(keep.view(shape), relevance, 0)
        v = torch.tensor(self.chosen, dtype=value.dtype, device=value.device)
        v = (v / v.norm()).view(shape)
        # h = c v + rest: c's relevance is c v.(R / h), and h_i v_i of it lies at unit i
        steepness = torch.where(value == 0, 0, relevance / value)
        return value * v * (v * steepness).sum(axis, keepdim=True)


def conditions(through: Mapping[str, Sequence[float] | int]) -> dict[str, Condition]:
    """Read what was asked for.

    Raises:
        SettingsError: a layer with neither units nor a direction.
    """
    found = {}
    for layer, given in through.items():
        chosen = (given,) if isinstance(given, int) else tuple(given)
        whole = {isinstance(one, int) and not isinstance(one, bool) for one in chosen}
        known = all(isinstance(one, int | float) for one in chosen) and len(whole) == 1
        if not known or (True in whole and min(chosen) < 0) or not (True in whole or any(chosen)):
            raise SettingsError(
                f"LRP needs through={{layer: numbers of units, or a direction in floats}}, got {given!r} for {layer!r}"
            )
        found[layer] = Condition(chosen)
    return found
