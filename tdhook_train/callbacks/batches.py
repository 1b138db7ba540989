"""Batches of any make as TensorDicts, and the one that a callback always measures on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import KeyMissingError, SettingsError, did_you_mean
from tdhook_train.keys import by_name
from tdhook_train.observer import ProbeSet
from tdhook_train.undo import kept_randomness

__all__ = ["FixedBatch", "Inputs", "as_tensordict", "in_keys"]

Inputs = str | Sequence[str] | Mapping[str, str] | None

_NAMES = ("input", "target")  # of the parts of a tuple


@dataclass(frozen=True)
class FixedBatch:
    """What a callback always measures on, as it was asked for.

    Args:
        batch: as the training has it, or
        dataloader: whose first rows are taken.
        rows: how many of them.
        groups: which rows belong together; each is one of its own, if None.

    Raises:
        MisconfigurationException: both a batch and a dataloader.
    """

    batch: Any
    dataloader: Iterable[Any] | None
    rows: int
    groups: str | Tensor | None

    def __post_init__(self) -> None:
        if self.batch is not None and self.dataloader is not None:
            raise MisconfigurationException("a callback takes a batch or a dataloader, not both")

    def settled(self, trainer: Trainer) -> ProbeSet | None:
        """Bring it to the precision of a fit; None where nothing was asked for."""
        batch = self.batch
        if self.dataloader is not None:
            # a DataLoader draws its base seed, whether it shuffles or not, and augmented data from any generator
            with kept_randomness(seed=0):
                batch = _first_rows(self.dataloader, self.rows)
        if batch is None:
            return None
        td = as_tensordict(trainer.precision_plugin.convert_input(batch))
        return ProbeSet(td, groups="rows" if self.groups is None else self.groups)


def as_tensordict(batch: Any) -> TensorDict:
    """Name the parts of a batch.

    Args:
        batch: a tensor becomes ``input``; of a tuple the first part ``input``, the second ``target``, others by number;
            a mapping and a dataclass keep their names, and what lies in theirs is nested: the batch of a dictionary of
            loaders, ``{"a": (x, y)}``, has ``("a", "input")`` and ``("a", "target")``. A TensorDict is taken as it is.
            What is no tensor with as many rows as the first is left out.

    Raises:
        SettingsError: nothing is left.
    """
    if isinstance(batch, TensorDictBase):
        return batch if batch.batch_dims else batch.auto_batch_size_(1)
    leaves = _leaves(batch)
    if not leaves:
        raise SettingsError(
            f"a batch of type {type(batch).__name__} holds no tensor with one row an item; a callback knows tensors, "
            "mappings, tuples and dataclasses of them, and TensorDicts, but no list of lists (of several loaders, give "
            "the trainer a dictionary): give the callback a batch= of one of these"
        )
    rows = len(leaves[0][1])
    kept = {key: value for key, value in leaves if len(value) == rows}
    if all(isinstance(key, str) for key in kept):
        return TensorDict(kept, batch_size=[rows])
    td = TensorDict(batch_size=[rows])  # which would else put nested keys last
    for key, value in kept.items():
        td.set(key, value)
    return td


def _leaves(batch: Any) -> list[tuple[NestedKey, Tensor]]:
    """Return all tensors of rows, what lies in inner lists last, so that it does not decide what a row is."""
    found: list[tuple[int, NestedKey, Tensor]] = []

    def walk(value: Any, path: tuple[str, ...], lists: int) -> None:
        if isinstance(value, Tensor):
            if value.ndim:
                found.append((lists, path if len(path) > 1 else path[0] if path else _NAMES[0], value))
            return
        if (parts := _parts(value)) is None:
            return
        for name, part in parts.items():
            # a list in a list is one tensor an item, as images of several sizes are
            if not (_is_list(value) and _is_list(part)):
                walk(part, (*path, name), lists + _is_list(part))

    walk(batch, (), 0)
    if any(lists for lists, _, _ in found):
        found.sort(key=lambda leaf: leaf[0])
    return [(key, value) for _, key, value in found]


def _parts(batch: Any) -> dict[str, Any] | None:
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items()}
    if hasattr(batch, "_asdict"):
        return dict(batch._asdict())
    if is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in fields(batch)}
    if _is_list(batch):
        return {_NAMES[i] if i < len(_NAMES) else str(i): part for i, part in enumerate(batch)}
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and not hasattr(value, "_asdict")


def in_keys(batch: TensorDictBase, inputs: Inputs) -> list[NestedKey] | dict[NestedKey, str]:
    """Say which keys a model's ``forward`` takes: the first one, unless ``inputs`` names others.

    Raises:
        KeyMissingError: a key that the batch has not.
    """
    known = by_name(batch)
    if inputs is None:
        return list(known.values())[:1]
    wanted = inputs if isinstance(inputs, Mapping) else [inputs] if isinstance(inputs, str) else list(inputs)
    for key in wanted:
        if key not in known:
            raise KeyMissingError(f"inputs={inputs!r}: the batch has no {key!r}{did_you_mean(key, known)}")
    if isinstance(wanted, Mapping):
        return {known[key]: argument for key, argument in wanted.items()}
    return [known[key] for key in wanted]


def _first_rows(batches: Any, rows: int) -> TensorDict:
    """Take the first rows of an iterable of batches, without changing what it would draw for others."""
    taken: list[TensorDict] = []
    for batch in batches:
        taken.append(as_tensordict(batch))
        if sum(len(td) for td in taken) >= rows:
            break
    if not taken:
        raise SettingsError("the dataloader of the probe set gave no batch")
    return torch.cat(taken)[:rows]
