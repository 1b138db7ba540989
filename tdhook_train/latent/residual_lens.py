"""What lenses share: the residual stream after each layer, given to the head as if the network ended there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import NetworkError, PathError, SettingsError, TargetError, did_you_mean
from tdhook_train.hooks import HookedModel, Selection, Site
from tdhook_train.hooks.paths import Selector, parse, shown
from tdhook_train.keys import dotted, path_of
from tdhook_train.method import Method, Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.lens import scores
from tdhook_train.ops.targets import first_floating, floating, given_by, named, refuse_unknown
from tdhook_train.ops.units import evenly_spaced

__all__ = ["LENS_REASONS", "Read", "ResidualLens", "Tail"]

_KINDS = ("logits", "values")
_OTHER_SHAPE, _NOT_FINITE, _LOST, _CONSTANT, _LATER = 1, 2, 3, 4, 5
LENS_REASONS = {
    0: "read, or no layer of this network",
    _OTHER_SHAPE: "the layer gives out another shape than the head takes in, or no rows in front",
    _NOT_FINITE: "the layer, or what the head makes of it, is not finite",
    _LOST: "the network's own output is not finite",
    _CONSTANT: "the network's own output is the same on all rows: R² has no meaning",
    _LATER: "the layer is part of the head, or runs after it",
}


@dataclass(frozen=True, eq=False)
class Tail:
    """The rest of a network from its head on, as a function of what the head takes in.

    Args:
        model: the network.
        batch: its inputs.
        head: the site of the head's input.
        key: the output that is wanted.
        stream: what the head takes in, ``[row, ...]``.
        final: what the network gives out, ``[row, ...]``.
    """

    model: HookedModel
    batch: TensorDictBase
    head: str
    key: NestedKey
    stream: Tensor
    final: Tensor

    def __call__(self, stream: Tensor) -> Tensor:
        """Run the network, the head on this; with a graph back to it where gradients are on."""
        with self.model.bent({self.head: stream.to(self.stream)}, side="input"):
            return self.model.forward(self.batch).get(self.key)

    def on(self, rows: Tensor) -> Tail:
        """Return the rest of the network on some of the rows."""
        parts = (value[rows.to(self.stream.device)] for value in (self.stream, self.final))
        return Tail(self.model, self.batch[rows.to(self.stream.device)], self.head, self.key, *parts)

    @cached_property
    def later(self) -> set[str]:
        """The sites of the head and of all that runs after it."""
        inside, ran = f"{parse(self.head).module}.", self.model.traced
        begun = (i for i, row in enumerate(ran) if any(f"{path}.".startswith(inside) for path in row.paths))
        return {str(row.site) for row in ran[next(begun, len(ran)) :]}


@dataclass(frozen=True)
class Read:
    """What was read of one layer: the outputs in the end, what else a method says of it, and a reason, if any."""

    lens: Tensor
    more: Mapping[str, Tensor]
    reason: int = 0


@dataclass(frozen=True)
class ResidualLens(Method):
    """What the head of a network makes of the residual stream after each layer.

    Args:
        layers: paths, patterns, module classes or predicates of the modules that give out the stream: the blocks.
        head: the first module that reads the stream at its end, one in each network: the final normalisation where
            there is one, otherwise the head. All that runs from it on counts; ``path:name`` is an argument by name.
        output: which output; the first floating one by default.
        output_is: logits of categories along the last dimension, or values (numbers of any kind).
        rows: read at most this many rows, spread evenly over the batch.
    """

    layers: Selection
    head: Selector
    output: NestedKey | None = None
    output_is: Literal["logits", "values"] = "logits"
    rows: int = 256

    looks_back: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        for setting in ("layers", "head"):
            if getattr(self, setting) in (None, ""):
                raise SettingsError(f"{name} needs {setting}=: {_SAYS[setting]}")
        if not (isinstance(self.head, str) or callable(self.head)):
            raise SettingsError(f"{name} needs head= as one path, pattern, class or predicate, got {self.head!r}")
        if self.output_is not in _KINDS:
            raise SettingsError(f"output_is={self.output_is!r} is none of {', '.join(map(repr, _KINDS))}")
        if self.rows < 2:
            raise SettingsError(f"{name} needs rows of 2 or more, got {self.rows}")
        if self.output is not None:
            named(self.output)

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers."""
        return model.sites(self.layers)

    def check(self, models: Mapping[str, HookedModel]) -> None:
        """Refuse a head and an output that no network has."""
        super().check(models)
        chosen = self.chosen(models)
        if not any(model.has(self.head) for model in chosen.values()):
            known = [f"{name}.{path}" if name else path for name, model in chosen.items() for path in model.modules]
            near = did_you_mean(self.head, known) if isinstance(self.head, str) else ""
            titles = " or ".join(model.title for model in chosen.values())
            raise PathError(f"head={shown(self.head)} matches no module of {titles}{near}")
        if self.output is not None:
            refuse_unknown(self.output, {name: model.out_keys for name, model in chosen.items()})

    def concerns(self, model: HookedModel) -> bool:
        """Whether this network has such layers, such a head and such an output."""
        known = self.output is None or given_by(named(self.output), model.out_keys)
        return bool(known) and model.has(self.head) and super().concerns(model)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The layers, and the rows of the batch."""
        return super().labels(seen, model) | {"batch": evenly_spaced(len(seen.batch), self.rows).tolist()}

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Read every layer."""
        with torch.inference_mode(False), torch.no_grad():
            index = evenly_spaced(len(seen.batch), self.rows)
            tail = self._tail(seen.batch, index, model)
            groups = torch.arange(len(index)) if seen.groups is None else seen.groups.cpu()[index]
            read = [self._of_layer(site, self._rows(seen, site, index), tail, groups) for site in self.taps(model)]
        found: dict[NestedKey, Tensor] = {"lens": torch.stack([one.lens for one in read])}
        found |= {name: torch.stack([one.more[name] for one in read]) for name in read[0].more}
        found["reason"] = torch.tensor([one.reason for one in read], dtype=torch.int8)
        return TensorDict(found, batch_size=[])

    @abstractmethod
    def _read(self, value: Tensor, axis: int, tail: Tail, groups: Tensor) -> Read:
        """Read one layer.

        Args:
            value: of the shape of the stream, finite.
            axis: along which its units lie.
            tail: the rest of the network.
            groups: trajectory of each row.
        """

    def _nothing(self, tail: Tail) -> dict[str, Tensor]:
        """Say what stands for the scores of a layer that cannot be read."""
        nan = torch.full_like(tail.final, torch.nan)
        return scores(self.output_is, nan, nan)

    def _scores(self, tail: Tail, lens: Tensor) -> dict[str, Tensor]:
        return scores(self.output_is, tail.final, lens)

    def _rows(self, seen: Seen, site: str, index: Tensor) -> Tensor:
        value = seen.values[site]
        return value[index.to(value.device)] if value.shape[:1] == seen.batch.batch_size else value

    def _of_layer(self, site: str, here: Tensor, tail: Tail, groups: Tensor) -> Read:
        """Read a layer, or say why not."""
        ruled_out = tail.final.isneginf() & (self.output_is == "logits")
        if site in tail.later:
            reason = _LATER
        elif not (tail.final.isfinite() | ruled_out).all():
            reason = _LOST
        elif here.shape != tail.stream.shape or len(here) != len(groups):
            reason = _OTHER_SHAPE
        else:
            reason = 0 if here.isfinite().all() else _NOT_FINITE
        if reason:
            return Read(torch.full_like(tail.final, torch.nan), self._nothing(tail), reason)
        read = self._read(here, tail.model.unit_axis(site, here), tail, groups)
        lost = {name: value for name, value in read.more.items() if value.is_floating_point() and value.isnan()}
        if read.reason or not lost:
            return read
        constant = "r2" in lost and read.lens.isfinite().all()
        return Read(read.lens, read.more, _CONSTANT if constant else _NOT_FINITE)

    def _tail(self, whole: TensorDictBase, index: Tensor, model: HookedModel) -> Tail:
        """Return the rest of a network from its head on.

        Raises:
            NetworkError: several modules are named.
            TargetError: the output is no logits, or no floating-point number.
        """
        heads = [path for path, _ in model.chosen(self.head)]
        if len(heads) != 1:
            raise NetworkError(f"{type(self).__name__} reads by one head; head={shown(self.head)} names {heads}")
        items = parse(self.head).items if isinstance(self.head, str) else ()
        head, batch = str(Site(heads[0], items)), whole.select(*model.in_keys)[index.to(model.device())]
        with model.run(batch) as run:
            stream = run.get_input(head)
        key = self._key(run.output, model)
        final = floating({dotted(key): run.output.get(key)})[dotted(key)]
        if self.output_is == "logits" and (final.ndim < 2 or final.shape[-1] < 2):
            raise TargetError(
                f"{type(self).__name__} reads {dotted(key)!r} as logits, and it has {list(final.shape)}: one category "
                "alone; for numbers such as a value set output_is='values'"
            )
        return Tail(model, batch, head, key, stream.resolve(), final)

    def _key(self, outputs: TensorDictBase, model: HookedModel) -> NestedKey:
        """Return which output is read: of several below one key, as of a Hugging Face model, the first floating one."""
        key = first_floating(outputs, model.out_keys) if self.output is None else self.output
        value = outputs.get(key)
        if isinstance(value, Tensor):
            return key
        below = [(*path_of(key), *path_of(name)) for name in value.keys(include_nested=True, leaves_only=True)]
        return first_floating(outputs, below)


_SAYS = {
    "layers": "the modules that give out the residual stream, e.g. layers='blocks.*'",
    "head": "the first module that reads the stream at its end, e.g. head='norm'",
}
