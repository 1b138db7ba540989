"""Tensors inside what a module gives out or takes in: tuples, mappings, dataclasses and nests of these."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from tensordict import is_non_tensor, is_tensor_collection
from torch import Tensor

from tdhook_train.errors import PathError, did_you_mean
from tdhook_train.hooks.agents import without_agent
from tdhook_train.hooks.arguments import Arguments
from tdhook_train.hooks.paths import Site

__all__ = ["Place", "floating_items", "pick", "put", "tensor_items"]

Place = tuple[int | str, ...]


def tensor_items(value: Any, at: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """Yield every tensor with the way to it; a bare tensor has the empty one."""
    if isinstance(value, Tensor):
        yield at, value
    else:
        for name, part in _parts(value):
            yield from tensor_items(part, (*at, name))


def floating_items(value: Any) -> Iterator[tuple[Place, Tensor]]:
    """Yield the floating-point tensors with the way to each."""
    return ((at, tensor) for at, tensor in tensor_items(value) if tensor.is_floating_point())


def _parts(value: Any) -> Iterable[tuple[int | str, Any]]:
    if is_non_tensor(value):
        return ()
    if isinstance(value, (Mapping, Arguments)) or is_tensor_collection(value):
        return ((name if isinstance(name, int) else str(name), part) for name, part in value.items())
    if isinstance(value, (tuple, list)):
        return enumerate(value)
    if is_dataclass(value) and not isinstance(value, type):
        return ((f.name, getattr(value, f.name, None)) for f in fields(value))
    return ()


def pick(value: Any, site: Site) -> Tensor:
    """Return the tensor that ``site`` names in its module's output.

    Raises:
        PathError: there is none; names those there are.
    """
    found = value
    try:
        for item in _way(value, site.items):
            found = _child(found, item)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        found = None
    if isinstance(found, Tensor):
        return found
    known = [str(Site(site.module, at)) for at, _ in floating_items(value)]
    raise PathError(
        f"{str(site)!r} names no tensor: module {site.module!r} has a {type(value).__name__} there"
        f"{did_you_mean(str(site), known)}"
    )


def put(value: Any, items: Place, new: Tensor, given: tuple[Any, ...] = ()) -> Any:
    """Return ``value`` with the tensor at ``items`` replaced, everything else as it was.

    A copy, unless the value is one of ``given``: a module that writes into the mapping that it was called with (as
    TensorDictModules do) has callers that go on with theirs.
    """
    items = _way(value, items)
    if not items:
        return new
    name, *rest = items
    part = put(_child(value, name), tuple(rest), new)
    if isinstance(value, MutableMapping) and any(value is one for one in given):
        value[_key(value, name)] = part
        return value
    return _with(value, name, part)


def _way(value: Any, items: Place) -> Place:
    items = without_agent(items)
    return (0,) if isinstance(value, Arguments) and not items else items  # the first argument, where none is named


def _child(value: Any, name: int | str) -> Any:
    if isinstance(value, Tensor):
        raise TypeError("an index into a lone tensor would be a row of the batch")
    key = _key(value, name)
    return value[key] if hasattr(value, "__getitem__") else getattr(value, str(key))


def _with(value: Any, name: int | str, new: Any) -> Any:
    key = _key(value, name)
    if isinstance(value, tuple):
        parts = list(value)
        parts[int(key)] = new
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    changed = value.copy() if is_tensor_collection(value) else copy.copy(value)
    if hasattr(changed, "__setitem__"):
        changed[key] = new
    else:
        object.__setattr__(changed, str(key), new)  # also in a frozen dataclass
    return changed


def _key(value: Any, name: int | str) -> int | str:
    """Return what the container itself calls an item: fields of a named tuple by place, keys of a mapping by order."""
    if isinstance(name, str) and hasattr(value, "_fields"):
        return value._fields.index(name)
    if isinstance(name, int) and isinstance(value, Mapping) and name not in value:
        return str(name) if str(name) in value else list(value)[name]
    return name
