"""What methods that read attention share: which layers, on which rows, by a pass of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from tensordict import NestedKey
from torch import Tensor

from tdhook_train.errors import NetworkError, SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.attention import attends, attention_weights
from tdhook_train.method import Method, Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.units import evenly_spaced

__all__ = ["AttentionReading"]

_REDUCTIONS = ("none", "mean")


@dataclass(frozen=True)
class AttentionReading(Method):
    """A method that reads what attention layers weigh.

    Costs one forward pass over the rows, in which every ``nn.MultiheadAttention`` attends twice: it drops its weights
    when it is run, and is asked for them again, on the same queries, keys and masks.

    Args:
        layers: paths, patterns, module classes or predicates of the attention layers. By default every
            ``nn.MultiheadAttention`` and every module with "attention" in the name of its class that gives out its
            weights, such as those of Hugging Face with ``attn_implementation="eager"``.
        rows: read at most this many rows, spread evenly over the batch.
        reduction: of the rows: none, or their mean; then without a batch dimension.
    """

    layers: Selection = attends
    rows: int = 16
    reduction: Literal["none", "mean"] = "none"

    looks_back: ClassVar[bool] = False
    shown: ClassVar[tuple[str, ...] | None] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1:
            raise SettingsError(f"{type(self).__name__} needs rows of 1 or more, got {self.rows}")
        if self.reduction not in _REDUCTIONS:
            raise SettingsError(f"reduction={self.reduction!r} is none of {', '.join(map(repr, _REDUCTIONS))}")

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """A mean over rows has none."""
        gone = self.reduction != "none"
        return super().dims(key, ndim + gone)[gone:]

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The rows of the batch, or its sequences."""
        if self.reduction != "none":
            return {}
        count = len(seen.batch) if model.sequences is None else model.sequences[0]
        return {"batch": evenly_spaced(count, self.rows).tolist()}

    def _weights(self, seen: Seen, model: HookedModel) -> Mapping[str, Tensor]:
        """Return what each layer weighs, ``[row, head, query, key]``."""
        batch, apart = seen.batch.select(*model.in_keys), model.sequences is None
        count = len(batch) if model.sequences is None else model.sequences[0]  # sequences run all together
        index = evenly_spaced(count, self.rows)
        given = batch[index.to(model.device())] if apart else batch
        found = attention_weights(model, given, self.layers)
        for layer, value in found.items():
            if len(value) != (rows := len(index) if apart else count):
                raise NetworkError(
                    f"{type(self).__name__}: {layer!r} weighs {list(value.shape)}, which is not [batch, head, query, "
                    f"key] for {rows} rows"
                )
        return found if apart else {layer: value[index.to(value.device)] for layer, value in found.items()}

    def _reduced(self, value: Tensor) -> Tensor:
        return value if self.reduction == "none" else value.mean(0)
