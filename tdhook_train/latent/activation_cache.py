"""The activations themselves, kept row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tensordict import NestedKey, TensorDict, TensorDictBase

from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.method import Method, Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.units import evenly_spaced

__all__ = ["ActivationCache"]


@dataclass(frozen=True)
class ActivationCache(Method):
    """What every layer gives out, for some rows of the batch; costs no pass of its own.

    Args:
        layers: paths, patterns, module classes or predicates.
        rows: keep at most this many rows, spread evenly over the batch; all by default.

    Writes:
        ``("activation", layer)`` [batch, *unit]: as the layer gave it.

    Source: the activation caching of TDHook, arXiv:2509.25475.
    """

    layers: Selection = "**"
    rows: int | None = None

    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {"activation": "batch *unit"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None and self.rows < 1:
            raise SettingsError(f"ActivationCache needs rows of 1 or more, got {self.rows}")

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers."""
        return model.sites(self.layers)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:  # noqa: ARG002 - the same for every network
        """The rows of the batch."""
        return {"batch": evenly_spaced(len(seen.batch), self.rows).tolist()}

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Units of layers of different widths are told apart by the layer's name."""
        return tuple(name if name == "batch" else f"{key[-1]}.{name}" for name in super().dims(key, ndim))

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Keep the rows."""
        index = evenly_spaced(len(seen.batch), self.rows)
        kept = {("activation", site): seen.values[site][index] for site in self.taps(model)}
        return TensorDict(kept, batch_size=[])
