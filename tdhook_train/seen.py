"""What a method is shown of one network, and the pass that reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import KeyMissingError, did_you_mean
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import by_name, dotted, path_of
from tdhook_train.ops.fingerprint import fingerprint
from tdhook_train.ops.targets import Target, read
from tdhook_train.schedule import Times

__all__ = ["Part", "Parts", "Seen", "given_out", "inputs_below", "inputs_hash", "look", "row_before"]


@dataclass
class Seen:
    """Everything a method may know.

    Args:
        batch: inputs and outputs. An output stands at its own key, unless some network reads that key; either way it
            also stands below its network's name where there are several.
        values: what the sites that the method asked for gave out, by site.
        groups: trajectory of each row, ``[n]``, or None.
        ordered: whether the rows of each trajectory lie together and in the order of time.
        generator: where a method's randomness comes from; seeded by (seed, step).
        initial: the network at initialisation.
        previous: this method's last row.
        clock: the moment of the training.
        names: labels of the features of a key, e.g. ``{"observation": ["x", "v"]}``.
        memo: a place for what stays the same between ticks on one probe set; empty by hand. It never changes a
            result.
    """

    batch: TensorDictBase
    values: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Tensor | None = None
    ordered: bool = False
    generator: torch.Generator | None = None
    initial: HookedModel | None = None
    previous: TensorDictBase | None = None
    clock: Times | None = None
    names: Mapping[NestedKey, Sequence[str]] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One network of a measurement: what was seen of it, and the model for methods that need passes of their own."""

    seen: Seen
    model: HookedModel

    def told(self, **known: Any) -> Part:
        """Return the part with further fields of :class:`Seen` filled in."""
        return Part(replace(self.seen, **known), self.model)


Parts = Mapping[str, Part]


def inputs_below(td: TensorDictBase, prefix: str, model: HookedModel) -> TensorDict:
    """Return a model's inputs from below a prefix: ``("positive", key)`` under ``key``.

    Raises:
        KeyMissingError: one is absent; names the nearest keys.
    """
    found: dict[NestedKey, Any] = {}
    for key in model.in_keys:
        path = (prefix, *path_of(key))
        if path not in td.keys(include_nested=True):
            raise KeyMissingError(f"{path!r} is not in the batch{did_you_mean(dotted(path), by_name(td))}")
        found[key] = td.get(path)
    return TensorDict(found, batch_size=td.batch_size)


def look(model: HookedModel, batch: TensorDictBase, sites: Sequence[str]) -> tuple[dict[str, Tensor], TensorDictBase]:
    """Run one pass that only reads: the values at the sites, and the outputs."""
    with model.run(batch) as run:
        proxies = {site: run.get(site) for site in sites}
    values = {site: proxy.resolve() for site, proxy in proxies.items()}
    return values, run.output.select(*model.out_keys, strict=False)


def given_out(seen: Seen, model: HookedModel, target: Target) -> Tensor:
    """Return an output of this network, also where another gives one of that name or the batch holds one."""
    own = seen.batch.get(model.name, None) if model.name else None
    return read(seen.batch if own is None else own, target)


def inputs_hash(seen: Seen, model: HookedModel) -> Tensor:
    """Hash what a network was run on, once a probe set."""
    known = ("inputs", model.name)
    if known not in seen.memo:
        seen.memo[known] = fingerprint(TensorDict({key: seen.batch.get(key) for key in model.in_keys}))
    return torch.tensor(seen.memo[known])


def row_before(seen: Seen, model: HookedModel) -> TensorDictBase | None:
    """Return what the row before says of a network; None where there is none."""
    return seen.previous if seen.previous is None or not model.name else seen.previous.get(model.name, None)
