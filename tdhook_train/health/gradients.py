"""What the measures share that go by gradients with respect to the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from tdhook_train.errors import SettingsError
from tdhook_train.health.fitting import rows_of
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.paths import module_at
from tdhook_train.hooks.weighted import with_weights
from tdhook_train.isolation import private_copy
from tdhook_train.method import Method, Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.slopes import slopes
from tdhook_train.ops.targets import beside, explained, named
from tdhook_train.ops.units import evenly_spaced

__all__ = ["OfGradients", "Weighted"]


@dataclass(frozen=True)
class OfGradients(Method):
    """A measure of the gradients of some outputs with respect to the weights of each layer, on a private copy.

    Args:
        targets: what is differentiated: an output key, ``("output", 3)`` for one feature of it, a function of the
            TensorDict of outputs, inputs and the batch's other keys that gives one number a row, such as a loss (see
            :mod:`tdhook_train.ops.objectives`), a list of these or a mapping of names to these. By default every
            feature of the first output.
        layers: whose weights: paths, patterns, module classes or predicates. A pattern gives every module with weights
            of its own; a module that is named by its path, all weights below it.
        rows: go by at most this many rows, spread evenly over the batch.
    """

    targets: Any = None
    layers: Selection = "**"
    rows: int = 128

    looks_back: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1:
            raise SettingsError(f"{type(self).__name__} needs rows of 1 or more, got {self.rows}")
        if self.targets is not None:
            named(self.targets)

    def concerns(self, model: HookedModel) -> bool:
        """Whether the network gives out a target, and has a layer with weights that is asked for."""
        return super().concerns(model) and bool(with_weights(model, self.layers))

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Layers with weights, and targets."""
        layers = with_weights(model, self.layers)
        kinds = [type(module_at(model.module, path)).__name__ for path in layers]
        targets = explained(seen.batch, self.targets, model.out_keys, len(seen.batch), seen.batch)
        return {"layer": _titles(layers, model), "layer_type": kinds, "target": list(targets)}

    def weighted(self, seen: Seen, model: HookedModel) -> Weighted:
        """Return the targets of some rows as a function of the weights of a private copy."""
        index = evenly_spaced(len(seen.batch), self.rows)
        batch = rows_of(model, seen.batch, index)
        held = beside(seen.batch, self.targets, [*model.in_keys, *model.out_keys])
        for key, value in held.items():
            batch.set(key, value.clone() if model.sequences is not None else value[index.to(value.device)])
        return Weighted(model, self.layers, self.targets, batch, index if model.sequences is not None else None)


class Weighted(nn.Module):
    """The targets of some rows, as a function of the weights; made outside inference mode.

    Args:
        model: the network that is copied.
        layers: whose weights.
        targets: as a method takes them.
        batch: inputs, and what else the targets read.
        index: which rows of the batch count; all by default.
    """

    def __init__(
        self, model: HookedModel, layers: Selection, targets: Any, batch: TensorDict, index: Tensor | None
    ) -> None:
        super().__init__()
        self.net = private_copy(model.module)
        self._hooked, self._targets, self._batch = model.on(self.net), targets, batch
        self._index = torch.arange(len(batch)) if index is None else index
        of = {parameter: name for name, parameter in self.named_parameters()}
        paths = with_weights(model, layers)
        self.layers = {
            title: [of[weight] for weight in module_at(self.net, path).parameters(recurse=below)]
            for title, (path, below) in zip(_titles(paths, model), paths.items(), strict=True)
        }
        """The names of the weights of each layer."""
        asked = {name for names in self.layers.values() for name in names}
        self.weights = {name: value for name, value in self.named_parameters() if name in asked}

    def __len__(self) -> int:
        return len(self._index)

    def forward(self, batch: TensorDictBase) -> Tensor:
        """Return ``[row, target]``."""
        outputs = self._hooked.forward(batch)
        found = explained(outputs, self._targets, self._hooked.out_keys, len(batch), batch)
        return torch.stack(list(found.values()), 1)

    def gradients_of_mean(self) -> dict[str, Tensor]:
        """Differentiate the mean over rows of each target: ``[target, *weight]`` by name."""
        with torch.enable_grad():
            self.requires_grad_(True)
            means = self(self._batch)[self._index].mean(0)
            found = [slopes(one, list(self.weights.values()), keep=True) for one in means]
        return {name: torch.stack(each) for name, each in zip(self.weights, zip(*found, strict=True), strict=True)}

    def gradients(self, rows: Tensor) -> dict[str, Tensor]:
        """Differentiate the targets of some of the rows, one by one: ``[row, target, *weight]`` by name.

        All at once where ``torch.func`` can run the network so; otherwise a pass back for each.
        """
        try:
            return self._at_once(rows)
        except Exception:  # whatever a network does that cannot be mapped: running it as it is says what is wrong
            return self._one_by_one(rows)

    def _at_once(self, rows: Tensor) -> dict[str, Tensor]:
        if self._hooked.sequences is not None:
            raise NotImplementedError("rows of sequences are not run alone")
        leaves = dict(self._batch[self._index[rows]].items(include_nested=True, leaves_only=True))
        keys: list[NestedKey] = list(leaves)

        def one(weights: Mapping[str, Tensor], values: Sequence[Tensor]) -> Tensor:
            row = TensorDict({key: value[None] for key, value in zip(keys, values, strict=True)}, batch_size=[1])
            return functional_call(self, dict(weights), (row,))[0]

        return vmap(jacrev(one), in_dims=(None, 0))(self.weights, list(leaves.values()))

    def _one_by_one(self, rows: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            self.requires_grad_(True)
            values = self(self._batch)[self._index[rows]]
            of = list(self.weights.values())
            found = [[slopes(value, of, keep=True) for value in row] for row in values]
        return {
            name: torch.stack([torch.stack([target[i] for target in row]) for row in found])
            for i, name in enumerate(self.weights)
        }


def _titles(paths: Mapping[str, bool], model: HookedModel) -> list[str]:
    return [path or type(model.module).__name__ for path in paths]
