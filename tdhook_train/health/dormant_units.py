"""Units that have fallen asleep: active far less than their neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.method import Method, Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.units import dormancy, padded, pooled

__all__ = ["DormantUnits"]


@dataclass(frozen=True)
class DormantUnits(Method):
    """Which units of a layer are dormant: mean absolute activation at most τ of the layer's average.

    ``s_i = E|h_i| / mean_k E|h_k|``; unit i is τ-dormant when ``s_i <= τ``. A saturated tanh unit is *not* dormant by
    this rule: see :class:`~tdhook_train.health.DeadUnits`. Costs no pass of its own.

    Args:
        layers: paths, patterns, module classes or predicates.
        taus: thresholds.

    Writes:
        ``dormant`` [layer, tau]: share of the layer's units, NaN of a layer that is not finite. ``dormant_pooled``
        [tau]: share of the units of all these layers together, but those that are not finite. ``dormancy``
        [layer, unit]: the score s, NaN beyond the layer's width; 0 everywhere in a layer that is all zero.

    Source: Sokar et al. 2023, arXiv:2302.12902, definition 3.1.
    """

    layers: Selection = "**"
    taus: tuple[float, ...] = (0.0, 0.025, 0.1)

    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {
        "dormant": "layer tau",
        "dormant_pooled": "tau",
        "dormancy": "layer unit",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "taus", tuple(float(tau) for tau in self.taus))
        if not self.taus or min(self.taus) < 0:
            raise SettingsError(f"DormantUnits needs thresholds of 0 or more, got taus={self.taus}")

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers."""
        return model.sites(self.layers)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Layers and thresholds."""
        return super().labels(seen, model) | {"tau": list(self.taus)}

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Score every unit."""
        values = {site: seen.values[site] for site in self.taps(model)}
        scores = [dormancy(value, model.unit_axis(site, value)) for site, value in values.items()]
        shares = torch.stack([_shares(score, self.taus) for score in scores])
        found = {
            "dormant": shares,
            "dormant_pooled": pooled(shares.unbind(), [len(score) for score in scores]),
            "dormancy": padded(scores),
        }
        return TensorDict(found, batch_size=[])


def _shares(score: Tensor, taus: Sequence[float]) -> Tensor:
    shares = torch.stack([(score <= tau).float().mean() for tau in taus])
    return torch.where(score.isnan().any(), torch.nan, shares)
