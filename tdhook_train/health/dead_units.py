"""Units that no longer respond to their input at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.method import Method, Seen
from tdhook_train.ops.units import as_rows, padded, pooled

__all__ = ["DeadUnits"]

_SATURATING = (nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid)


@dataclass(frozen=True)
class DeadUnits(Method):
    """Which units of a layer give out the same whatever comes in.

    A unit of a saturating activation (tanh, sigmoid, …) is dead when its standard deviation over the batch is below
    ``min_std``; any other unit is dead when it is zero on every row. Costs no pass of its own.

    Args:
        layers: paths, patterns, module classes or predicates.
        min_std: in units of the activation.

    Writes:
        ``dead`` [layer]: share of the layer's units, NaN where one of them is not finite. ``dead_pooled``: share of the
        units of all these layers together, but those of which that is not known. ``dead_unit`` [layer, unit]: 1 or 0,
        NaN beyond the width and where a unit is not finite. ``width`` [layer]: number of units.

    Source: Lyle et al. 2023, arXiv:2303.01486 (dead and saturated units).
    """

    layers: Selection = "**"
    min_std: float = 1e-3

    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {
        "dead": "layer",
        "dead_pooled": "",
        "dead_unit": "layer unit",
        "width": "layer",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_std < 0:
            raise SettingsError(f"DeadUnits needs min_std of 0 or more, got {self.min_std}")

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers."""
        return model.sites(self.layers)

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Judge every unit."""
        dead = []
        for site in self.taps(model):
            value = seen.values[site]
            rows = as_rows(value, model.unit_axis(site, value))
            dead.append(self._dead(rows, model.module_of(site)))
        shares, widths = torch.stack([units.mean() for units in dead]), [len(units) for units in dead]
        values = {
            "dead": shares,
            "dead_pooled": pooled(shares.unbind(), widths),
            "dead_unit": padded(dead),
            "width": torch.tensor(widths),
        }
        return TensorDict(values, batch_size=[])

    def _dead(self, rows: Tensor, module: nn.Module) -> Tensor:
        largest = rows.abs().amax(0)
        if isinstance(module, _SATURATING):
            dead = (rows - rows.mean(0)).square_().mean(0).sqrt() < self.min_std
        else:
            dead = largest == 0
        return torch.where(largest.isfinite(), dead.float(), torch.nan)
