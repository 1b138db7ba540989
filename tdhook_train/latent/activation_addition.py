"""The direction between two sides of a contrast, in the activations of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tensordict import TensorDict, TensorDictBase

from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.method import Method, Seen, inputs_below, look

__all__ = ["ActivationAddition"]


@dataclass(frozen=True)
class ActivationAddition(Method):
    """Which way a layer's activations move from one side of a contrast to the other.

    The vector to add elsewhere, with :class:`SteeringVectors`. Two forward passes.

    Args:
        layers: paths, patterns, module classes or predicates.

    Reads ``("positive", key)`` and ``("negative", key)`` for every input key of the model, in the same shapes.

    Writes:
        ``("steer", layer)`` [*position, unit]: positive less negative, the mean over the batch, positions kept.

    Source: Turner et al. 2023, arXiv:2308.10248; over several pairs Rimsky et al. 2023, arXiv:2312.06681.
    """

    layers: Selection = "**"

    reads: ClassVar[tuple[str, ...]] = ("positive", "negative")
    writes: ClassVar[Mapping[str, str]] = {"steer": "*position unit"}

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Run both sides and subtract."""
        if not seen.batch.batch_dims:
            raise SettingsError("ActivationAddition averages over the batch, but the TensorDict has batch_size=[]")
        sites = model.sites(self.layers)
        plus, minus = (look(model, inputs_below(seen.batch, side, model), sites)[0] for side in self.reads)
        batch = range(seen.batch.batch_dims)
        for site in sites:
            if plus[site].shape != minus[site].shape:
                raise SettingsError(
                    f"the sides of the contrast differ in shape at {site!r}: positive {tuple(plus[site].shape)}, "
                    f"negative {tuple(minus[site].shape)}; pad the shorter"
                )
        steer = {("steer", site): (plus[site] - minus[site]).mean(tuple(batch)) for site in sites}
        return TensorDict(steer, batch_size=[])
