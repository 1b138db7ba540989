"""What one row is made of: tensors under keys, and the numbers that say where they come from."""

from __future__ import annotations

import time as clock
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase, is_non_tensor, is_tensor_collection
from torch import Tensor

from tdhook_train.errors import SchemaError, SettingsError

__all__ = ["META", "Key", "RowMeta", "Value", "as_key", "file_part", "flatten", "key_name", "show", "with_meta"]

Key = tuple[str, ...]
Value: TypeAlias = Tensor | TensorDictBase | bytes  # what is no tensor is kept in a file of its own

META: dict[Key, torch.dtype] = {
    ("meta", "step"): torch.int64,
    ("meta", "frames"): torch.int64,
    ("meta", "epoch"): torch.int64,
    ("meta", "weights"): torch.int64,
    ("meta", "data"): torch.int64,
    ("meta", "attempt"): torch.int64,
    ("meta", "run"): torch.int64,
    ("meta", "time"): torch.float64,
    ("meta", "cost"): torch.float64,
}
_RESERVED = {
    "meta": "it holds what the buffer records about each row",
    "index": "TorchRL's sample() writes the positions of the sampled rows there",
}


@dataclass(frozen=True)
class RowMeta:
    """What describes a row.

    Args:
        step: optimizer steps behind the weights that were measured.
        frames: environment frames, or samples, seen so far.
        epoch: passes over the data so far.
        weights: 64-bit fingerprint of the weights, signed or unsigned.
        data: 64-bit fingerprint of the batch, signed or unsigned.
        attempt: how often the run had been reopened for writing.
        run: which of several merged runs it comes from.
        time: when the row was made, in Unix seconds.
        cost: how long the measurement took, in seconds.
    """

    step: int
    frames: int
    epoch: int
    weights: int
    data: int
    attempt: int
    run: int
    time: float
    cost: float

    def numbers(self) -> list[int | float]:
        """Return the numbers in the order of ``META``.

        Raises:
            SettingsError: a number is none, or does not fit into 64 bits.
        """
        return [_number(key, getattr(self, key[1]), dtype) for key, dtype in META.items()]

    @staticmethod
    def given(meta: Mapping[str, Any]) -> dict[Key, int | float]:
        """Return some of the numbers under their keys.

        Raises:
            SettingsError: a name is none of them, or a number is none or does not fit into 64 bits.
        """
        for name in meta:
            if ("meta", name) not in META:
                known = [key[1] for key in META]
                raise SettingsError(f"{name!r} is none of what describes a row ({', '.join(known)})")
        return {("meta", name): _number(("meta", name), value, META["meta", name]) for name, value in meta.items()}


def _number(key: Key, value: Any, dtype: torch.dtype) -> int | float:
    try:
        if dtype == torch.float64:
            return float(value)
        whole = int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise SettingsError(f"{key[1]}={value!r} is no number: {error}") from None
    if whole != value or not -(2**63) <= whole < 2**64:
        raise SettingsError(f"{key[1]}={value!r} is no whole number of 64 bits")
    return whole - 2**64 if whole >= 2**63 else whole  # unsigned fingerprints keep their bits


def with_meta(rows: TensorDictBase, of: str, attempt: int) -> TensorDictBase:
    """Return a shallow copy of rows, batch first, with what was left out of their meta.

    Raises:
        SchemaError: the step is missing, or there is something that is none of the meta, or of another dtype or shape.
    """
    if not isinstance(rows, TensorDictBase) or rows.batch_dims != 1:
        what = (
            f"batch size {tuple(rows.batch_size)}" if isinstance(rows, TensorDictBase) else f"a {type(rows).__name__}"
        )
        raise SchemaError(f"{of}: rows come as a TensorDict with one batch dimension, got {what}")
    rows = rows.copy()
    given = [key for key in rows.keys(include_nested=True, leaves_only=True) if as_key(key)[0] == "meta"]
    for key in given:
        known, value = META.get(key), rows.get(key)
        if known is None:
            raise SchemaError(f"{of}: key {key!r} is none of what describes a row ({', '.join(k[1] for k in META)})")
        if value.dtype != known or value.shape != rows.batch_size:
            raise SchemaError(
                f"{of}: key {key!r} has dtype {value.dtype} and shape {tuple(value.shape)}, expected {known} and "
                f"{tuple(rows.batch_size)}, a number a row"
            )
    if ("meta", "step") not in given:
        raise SchemaError(
            f"{of}: key ('meta', 'step') is missing: rows say at which step they were measured; "
            "ArtifactBuffer.extend(name, rows, step=...) adds it to all"
        )
    now = {"time": clock.time(), "attempt": attempt}
    for key, dtype in META.items():
        if key not in given:
            number = now.get(key[1], 0)
            rows[key] = torch.full(rows.batch_size, number, dtype=dtype, device="cpu")
    return rows


def as_key(key: str | tuple[str, ...]) -> Key:
    """Return a key as the tuple of its parts."""
    parts = (key,) if isinstance(key, str) else tuple(key) if isinstance(key, (tuple, list)) else ()
    if not parts or not all(isinstance(part, str) for part in parts):
        raise SchemaError(f"{key!r} is no key: a key is a string or a tuple of strings")
    return parts


def show(key: Key) -> str | Key:
    """Return a key as TensorDict shows it: a lone part as a string."""
    return key[0] if len(key) == 1 else key


def key_name(key: Key) -> str:
    """Return a key as one dotted name."""
    return ".".join(key)


def file_part(key: Key) -> str:
    """Return a key as part of a file name, for people: on every file system, and not too long."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in key_name(key))[:80]


def flatten(artifacts: TensorDictBase | Mapping[Any, Any], files: Collection[Key] = ()) -> dict[Key, Value]:
    """Return the values of a row by key, tensors detached, whatever the nesting.

    Args:
        artifacts: a TensorDict or nested mapping; numbers and arrays become tensors.
        files: keys whose values, with all that lies below them, are kept in a file.

    Raises:
        SchemaError: a value is no tensor, a key is reserved, or there is nothing.
    """
    if not (isinstance(artifacts, Mapping) or is_tensor_collection(artifacts)):
        raise SchemaError(f"a row is a TensorDict or a mapping of keys to tensors, got {type(artifacts).__name__}")
    row = dict(_leaves(artifacts, (), files))
    if not row:
        raise SchemaError("the row holds no tensor")
    for key in row:
        if key[0] in _RESERVED:
            raise SchemaError(f"key {show(key)!r} is reserved: {_RESERVED[key[0]]}; rename it")
    return row


def _leaves(tree: Any, prefix: Key, files: Collection[Key]) -> Iterator[tuple[Key, Value]]:
    for name, value in tree.items():
        key = (*prefix, name) if isinstance(name, str) else (*prefix, *as_key(name))
        if is_non_tensor(value) and isinstance(value.data, bytes):
            value = value.data
        if isinstance(value, (bytes, bytearray)):
            yield key, bytes(value)
        elif isinstance(value, Tensor):
            yield key, value.detach()
        elif is_non_tensor(value):
            raise SchemaError(f"key {show(key)!r} holds a {type(value).__name__}; rows hold tensors only")
        elif isinstance(value, Mapping) or is_tensor_collection(value):
            if key in files:
                yield key, _file_value(key, value)
            else:
                yield from _leaves(value, key, files)
        else:
            yield key, _as_tensor(key, value)


def _file_value(key: Key, value: Any) -> TensorDictBase:
    try:
        given: TensorDictBase = value if is_tensor_collection(value) else TensorDict(value)
        leaves = list(given.values(include_nested=True, leaves_only=True, is_leaf=_is_leaf))
    except (TypeError, ValueError, RuntimeError) as error:
        raise SchemaError(f"key {show(key)!r} holds what is no TensorDict: {error}") from None
    if strange := [leaf for leaf in leaves if not isinstance(leaf, Tensor)]:
        raise SchemaError(f"key {show(key)!r} holds a {type(strange[0]).__name__}; files hold tensors, or bytes alone")
    return given


def _is_leaf(kind: type) -> bool:
    return not issubclass(kind, TensorDictBase)


def _as_tensor(key: Key, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise SchemaError(f"key {show(key)!r} holds a {type(value).__name__}; rows hold tensors only") from None
