"""What names a module: a path, a pattern, a class or a predicate.

A *site* is one tensor that a module gives out: ``"encoder.2"``, or ``"head:1"`` for the second of a tuple,
``"lstm:1:0"`` for an item of an item, ``"net.0:agent 2"`` for the part of one of several agents. Patterns match dotted
names segment by segment: ``*`` is one segment, or any part of one (``"block*"``), and ``**`` any number of segments. A
pattern that ends in ``**`` names leaf modules only, so that a container does not repeat its last child.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tdhook_train.errors import PathError, SettingsError, did_you_mean

__all__ = [
    "Selection",
    "Selector",
    "Site",
    "chooser",
    "is_leaf",
    "is_pattern",
    "module_at",
    "parse",
    "selectors",
    "shown",
    "walk",
]

Selector = str | type[nn.Module] | Callable[[nn.Module], bool] | Callable[[str, nn.Module], bool]
Selection = Selector | Sequence[Selector]

_Scripted = torch.jit.ScriptModule
_COMPILED = "_orig_mod"  # where torch.compile keeps the module that it wraps


class Site(NamedTuple):
    """One tensor a module gives out: the module's path, and the way to the item where it gives out several."""

    module: str
    items: tuple[int | str, ...] = ()

    def __str__(self) -> str:
        """Write the site as text that :func:`parse` reads back."""
        return ":".join([self.module, *map(str, self.items)]) if self.items else self.module


@lru_cache(maxsize=4096)
def parse(text: str) -> Site:
    """Read ``"path"``, ``"path:1"``, ``"path:name"`` or ``"path:1:0"``; the prefixes of torch.compile fall away."""
    path, *items = text.split(":")
    if _COMPILED in path:
        path = ".".join(name for name in path.split(".") if name != _COMPILED)
    return Site(path, tuple(int(item) if item.lstrip("-").isdigit() else item for item in items))


def selectors(selection: Selection) -> tuple[Selector, ...]:
    """Bring one selector or a sequence of them to one form."""
    return tuple(selection) if isinstance(selection, Sequence) and not isinstance(selection, str) else (selection,)


def is_pattern(selector: Selector) -> bool:
    """Whether the selector may name many modules rather than one."""
    return not isinstance(selector, str) or "*" in selector


def shown(selector: Selector) -> str:
    """Write a selector for an error message."""
    return repr(selector) if isinstance(selector, str) else getattr(selector, "__qualname__", repr(selector))


def chooser(selector: Selector) -> Callable[[str, nn.Module], bool]:
    """Return whether a path and its module are meant by a selector; items after a colon are left aside.

    Args:
        selector: a path, a pattern, a module class, or a predicate of the module or of its path and the module.

    Raises:
        SettingsError: it is none of these.
    """
    if isinstance(selector, str):
        wanted = _segments(parse(selector).module)
        if wanted == ("**",):
            return lambda _path, module: is_leaf(module)
        leaves_only = wanted[-1:] == ("**",)
        return lambda path, module: (not leaves_only or is_leaf(module)) and _matches(wanted, _segments(path))
    if isinstance(selector, type):
        return lambda _path, module: isinstance(module, selector)
    if not callable(selector):
        raise SettingsError(
            f"layers are named by a path, a pattern, a module class or a predicate, got {type(selector).__name__}"
        )
    predicate: Callable[..., bool] = selector
    takes_path = len(inspect.signature(predicate).parameters) > 1
    return predicate if takes_path else lambda _path, module: predicate(module)


@lru_cache(maxsize=4096)
def _segments(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()  # the empty path is the model itself


@lru_cache(maxsize=65536)
def _matches(pattern: tuple[str, ...], name: tuple[str, ...]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_matches(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return bool(name) and _is_like(pattern[0], name[0]) and _matches(pattern[1:], name[1:])


def _is_like(segment: str, name: str) -> bool:
    if "*" not in segment:
        return segment == name
    return re.fullmatch(".*".join(map(re.escape, segment.split("*"))), name, re.DOTALL) is not None


def is_leaf(module: nn.Module) -> bool:
    """Whether a module holds no other."""
    return not module._modules or isinstance(module, nn.MultiheadAttention) or not _parts(module)  # its parts never run


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with its path, shared ones under each of their names.

    The wrappers of torch.compile are left out, and so is what is scripted, which takes no hooks.
    """
    waiting: list[tuple[str, nn.Module, tuple[nn.Module, ...]]] = [("", model, ())]
    while waiting:
        path, module, above = waiting.pop()
        if isinstance(module, _Scripted):
            continue
        if _COMPILED in module._modules:
            waiting.append((path, _behind(module), above))
            continue
        yield path, module
        if module._modules:
            start, above = f"{path}." if path else "", (module, *above)  # a module may hold one that holds it
            parts = [(start + name, part, above) for name, part in _parts(module) if part not in above]
            parts.reverse()
            waiting += parts


def _parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules in a module; what computes its weights is none of them."""
    parts = module._modules
    computed = "parametrizations" in parts and is_parametrized(module)
    return [(name, p) for name, p in parts.items() if p is not None and not (computed and name == "parametrizations")]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at ``path``, or raise :class:`PathError` naming the nearest ones."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():  # not get_submodule: TensorDictModules lend the names inside them
        module = None if module is None else _behind(module)._modules.get(name)
        if isinstance(module, _Scripted):
            raise PathError(f"path {path!r} leads to a scripted module (TorchScript), which takes no hooks")
    if module is None:
        known = [name for name, _ in walk(model)]
        raise PathError(f"path {path!r} names no module of {type(model).__name__}{did_you_mean(path, known)}")
    return _behind(module)


def _behind(module: nn.Module) -> nn.Module:
    """Look through the wrapper that torch.compile puts around a module."""
    inner = None if isinstance(module, _Scripted) else module._modules.get(_COMPILED)
    return module if inner is None else inner
