"""What is explained, differentiated or predicted: one number a row, from a batch of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_train.errors import KeyMissingError, SettingsError, TargetError, did_you_mean
from tdhook_train.keys import by_name, dotted, path_of, split_key

__all__ = [
    "Target",
    "beside",
    "columns",
    "explained",
    "first_floating",
    "floating",
    "given_by",
    "held_by",
    "label_of",
    "named",
    "read",
    "refuse_unknown",
]

Target = Any  # a key, a key with feature indices, or a function of the TensorDict

_MAX_COLUMNS = 64


def label_of(target: Target) -> str:
    """Name a target for axes and tables."""
    if callable(target):
        return str(getattr(target, "label", None) or getattr(target, "__name__", type(target).__name__))
    key, features = split_key(target)
    return ".".join([dotted(key), *map(str, features)])


def read(td: TensorDictBase, target: Target) -> Tensor:
    """Return the values of a target for every row; a nested key may be written with dots.

    Raises:
        KeyMissingError: the key is absent; names the nearest ones.
        TargetError: the feature index does not exist, or a function gave no tensor.
    """
    if callable(target):
        value = target(td)
        if not isinstance(value, Tensor):
            raise TargetError(f"target function {label_of(target)} gave {type(value).__name__}, not a tensor")
        return value
    key, features = split_key(target)
    if key not in td.keys(include_nested=True):
        known = by_name(td)
        name = dotted(key)
        if name not in known:
            raise KeyMissingError(f"target {name!r} is not in the batch{did_you_mean(name, known)}")
        key = known[name]
    value = td.get(key)
    try:
        return value[(..., *features)] if features else value
    except IndexError as error:
        given = ", ".join(map(str, features))
        raise TargetError(f"target {key!r} has features {tuple(value.shape[1:])}, not number {given}") from error


def floating(found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Refuse targets that are no floating-point numbers: they cannot be differentiated or moved by degrees.

    Raises:
        TargetError: names the first.
    """
    for name, value in found.items():
        if not value.is_floating_point():
            raise TargetError(f"target {name!r} is {value.dtype}; choose a floating-point output, such as logits")
    return found


def first_floating(outputs: TensorDictBase, out_keys: Sequence[NestedKey]) -> NestedKey:
    """Return the first output that is a floating-point tensor (the first of all where none is)."""
    for key in out_keys:
        value = outputs.get(key, None)
        if isinstance(value, Tensor) and value.is_floating_point():
            return key
    return out_keys[0]


def explained(
    outputs: TensorDictBase,
    targets: Any,
    out_keys: Sequence[NestedKey],
    rows: int,
    batch: TensorDictBase | None = None,
) -> Mapping[str, Tensor]:
    """Read what a method explains of one network, ``[rows]`` each; the first floating output where nothing is named.

    Args:
        outputs: of the network, and what else functions read.
        targets: as a method takes them.
        out_keys: of the network.
        rows: of the batch.
        batch: what objectives hold as it is, where the network gives out something else by that name.

    Raises:
        TargetError: a target is no floating-point number.
    """
    wanted = first_floating(outputs, out_keys) if targets is None else targets
    given = given_by(named(wanted), out_keys)
    return floating(columns(outputs, {n: _holding(t, batch) for n, t in given.items()}, rows))


def _holding(target: Target, batch: TensorDictBase | None) -> Target:
    """Let an objective read what it holds from the batch."""
    kept = {} if batch is None else {key: batch.get(key, None) for key in held_by(target)}
    known = {key: value for key, value in kept.items() if value is not None}
    return (lambda td: target(td.copy().update(known))) if known else target


def held_by(target: Target) -> Sequence[NestedKey]:
    """Return the keys of the batch that an objective reads, and that stay as they are there."""
    return getattr(target, "held", ()) if callable(target) else ()


def beside(batch: TensorDictBase, targets: Any, without: Sequence[NestedKey]) -> dict[NestedKey, Tensor]:
    """Return what a function among the targets may read beside the outputs; nothing where none is a function.

    Args:
        batch: ``[rows]``.
        targets: as a method takes them.
        without: keys that come from elsewhere.
    """
    if targets is None or not any(map(callable, named(targets).values())):
        return {}
    held = {path_of(key) for target in named(targets).values() for key in held_by(target)}
    known = {path_of(key) for key in without} - held
    leaves = batch.items(include_nested=True, leaves_only=True)
    return {key: value for key, value in leaves if path_of(key) not in known and isinstance(value, Tensor)}


def refuse_unknown(targets: Any, out_keys: Mapping[str, Sequence[NestedKey]]) -> None:
    """Refuse targets that no network gives out.

    Args:
        targets: as a method takes them.
        out_keys: of each network.

    Raises:
        TargetError: names the first, and the nearest outputs.
    """
    every = [key for keys in out_keys.values() for key in keys]
    for name, target in named(targets).items():
        if not given_by({name: target}, every):
            known = [dotted(key) for key in every]
            if callable(target):
                read = ", ".join(repr(dotted(key)) for key in target.outputs)
                raise TargetError(f"target {name!r} reads {read}, which no network gives out; there is {known}")
            raise TargetError(f"target {name!r} is given out by no network{did_you_mean(name, known)}")


def named(target: Target | Sequence[Target] | Mapping[str, Target]) -> dict[str, Target]:
    """Bring one target, a list of them or a mapping of names to one form."""
    if isinstance(target, Mapping):
        return dict(target)
    many = list(target) if isinstance(target, list) else [target]
    out = {label_of(item): item for item in many}
    if len(out) < len(many):
        raise SettingsError(f"two targets share the name of one of {[label_of(item) for item in many]}; name them")
    return out


def columns(td: TensorDictBase, targets: Mapping[str, Target], rows: int) -> dict[str, Tensor]:
    """Read targets as one column ``[rows]`` each; several features become ``name.0``, ``name.1`` and so on."""
    out: dict[str, Tensor] = {}
    for name, target in targets.items():
        value = read(td, target)
        if value.shape[:1] != (rows,):
            raise TargetError(f"target {name!r} has {tuple(value.shape)}; its first dimension must be the {rows} rows")
        if value.ndim == 1:  # without a step in the graph
            out[name] = value
            continue
        flat = value.reshape(rows, -1)
        if flat.shape[1] > _MAX_COLUMNS:
            raise TargetError(f"target {name!r} has {flat.shape[1]} features; name those wanted: ({name!r}, 0), …")
        out |= {name: flat[:, 0]} if flat.shape[1] == 1 else {f"{name}.{i}": c for i, c in enumerate(flat.unbind(1))}
    return out


def given_by(targets: Mapping[str, Target], out_keys: Sequence[NestedKey]) -> dict[str, Target]:
    """Keep the targets that one network gives out; functions stay, but for those whose ``outputs`` it lacks."""
    known = {path_of(key) for key in out_keys}

    def given(target: Target) -> bool:
        read = getattr(target, "outputs", ()) if callable(target) else [split_key(target)[0]]
        return all(any(path_of(key)[: len(name)] == name for name in known) for key in read)

    return {name: target for name, target in targets.items() if given(target)}
