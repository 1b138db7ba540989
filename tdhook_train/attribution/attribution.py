"""What every attribution shares: which outputs are explained, and on which rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import KeyMissingError, NetworkError, SettingsError, TargetError
from tdhook_train.hooks import HookedModel
from tdhook_train.method import Method, Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.targets import beside, explained, named
from tdhook_train.ops.units import evenly_spaced

__all__ = ["Attribution"]

_IMAGE = ("channel", "height", "width")


@dataclass(frozen=True)
class Attribution(Method):
    """A method that says what a network's inputs have to do with its outputs.

    Args:
        targets: what is explained: an output key, ``("output", 340)`` for one feature of it, a function of the
            TensorDict of outputs, inputs and the batch's other keys (such as the true class) that gives one number a
            row, a list of these or a mapping of names to these (the artifact then has a target dimension after the
            batch). By default every feature of the first output.
        init_attr_targets: TDHook's form instead of ``targets``: a function of (outputs, inputs) that returns a
            TensorDict whose leaves are explained.
        rows: explain at most this many rows, spread evenly over the batch; all by default.
    """

    targets: Any = None
    init_attr_targets: Callable[[TensorDictBase, TensorDictBase], TensorDictBase] | None = None
    rows: int | None = None

    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature"}

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.targets is not None and self.init_attr_targets is not None:
            raise SettingsError(f"{name} takes targets or init_attr_targets, not both")
        if self.rows is not None and self.rows < 1:
            raise SettingsError(f"{name} needs rows of 1 or more, got {self.rows}")
        if self.targets is not None:
            named(self.targets)

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """One target alone has no dimension of its own; features in three dimensions are those of an image."""
        names = super().dims(key, ndim if self._many else ndim + 1)
        if names[-3:] == tuple(f"feature_{i}" for i in range(3)):
            names = (*names[:-3], *_IMAGE)
        return tuple(name for name in names if self._many or name != "target")

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Targets, the rows of the batch, and the features of the input."""
        inputs = {key: value for key, value in self._inputs(seen, model).items() if value.is_floating_point()}
        index = evenly_spaced(len(seen.batch), self.rows)
        out: Labels = {} if self.rows is None else {"batch": index.tolist()}
        if self._many:
            out["target"] = list(self._explained(seen.batch, seen.batch, model))
        if len(inputs) == 1 and next(iter(inputs)) in seen.names:
            out["feature"] = list(seen.names[next(iter(inputs))])
        return out

    @property
    def _many(self) -> bool:
        return self.init_attr_targets is None and (self.targets is None or isinstance(self.targets, list | Mapping))

    def _index(self, seen: Seen, model: HookedModel) -> Tensor:
        """Return the rows that are explained."""
        return evenly_spaced(len(seen.batch), self.rows).to(model.device())

    def _inputs(self, seen: Seen, model: HookedModel) -> dict[NestedKey, Tensor]:
        inputs = {key: _as_numbers(seen.batch.get(key)) for key in model.in_keys}
        if not any(value.is_floating_point() for value in inputs.values()):
            kinds = {key: value.dtype for key, value in inputs.items()}
            raise KeyMissingError(f"{type(self).__name__} needs a floating-point input, the model reads {kinds}")
        return inputs

    def _beside(self, seen: Seen, model: HookedModel) -> dict[NestedKey, Tensor]:
        """Return what functions among the targets may read that the network neither reads nor gives out."""
        targets = self.init_attr_targets or self.targets
        return beside(seen.batch, targets, [*model.in_keys, *model.out_keys])

    def _moving(self, seen: Seen, model: HookedModel) -> dict[NestedKey, Tensor]:
        """Return the inputs as numbers that can be differentiated.

        Raises:
            NetworkError: the network gives something else for pixels as floating-point numbers than as bytes.
        """
        inputs = self._inputs(seen, model)
        changed = [key for key, value in inputs.items() if value.dtype != seen.batch.get(key).dtype]
        if not changed:
            return inputs
        batch = TensorDict(inputs | self._beside(seen, model), batch_size=seen.batch.batch_size)
        with torch.no_grad():
            found = self._explained(model(batch), batch, model)
        for name, expected in self._explained(seen.batch, seen.batch, model).items():
            if not torch.allclose(found[name], expected, rtol=1e-3, atol=1e-5, equal_nan=True):
                raise NetworkError(
                    f"{type(self).__name__}: {model.title} gives another {name!r} for {changed[0]!r} as floating-point "
                    "numbers than as bytes, which have no gradient; convert the pixels before the network"
                )
        return inputs

    def _explained(self, outputs: TensorDictBase, inputs: TensorDictBase, model: HookedModel) -> dict[str, Tensor]:
        """Read the targets from the outputs, ``[rows]`` each."""
        rows = len(outputs)
        if self.init_attr_targets is not None:
            leaves = self.init_attr_targets(outputs, inputs).flatten_keys(".")
            return {"+".join(leaves.keys()): sum(leaf.reshape(rows, -1).sum(1) for leaf in leaves.values())}
        found = dict(explained(outputs, self.targets, model.out_keys, rows))
        if not self._many and len(found) != 1:
            raise TargetError(f"target {self.targets!r} has {len(found)} features; explain one, or give a list")
        return found


def _as_numbers(value: Tensor) -> Tensor:
    """Bring the bytes of images to floating-point numbers of the same size, which the network then scales."""
    return value.to(torch.get_default_dtype()) if value.dtype == torch.uint8 and value.ndim > 3 else value
