"""Text to modules: what a path or a pattern names, in the order in which the model runs it.

A *site* is one tensor that a module gives out: ``"encoder.2"``, or ``"head:1"`` for the second of a tuple. Patterns
match dotted names segment by segment: ``*`` is one segment, ``**`` any number. A pattern that ends in ``**`` names
leaf modules only, so that a container does not repeat its last child.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from tensordict import is_tensor_collection
from torch import Tensor, nn

from tdhook_train.errors import PathError, did_you_mean
from tdhook_train.undo import Undo

__all__ = [
    "Site",
    "TracedSite",
    "eager",
    "floating_items",
    "is_pattern",
    "matches",
    "module_at",
    "parse",
    "pick",
    "select",
    "trace",
]


@dataclass(frozen=True)
class Site:
    """One tensor a module gives out: the module's path, and the item where it gives out several."""

    module: str
    item: int | str | None = None

    def __str__(self) -> str:
        """Write the site as text that :func:`parse` reads back."""
        return self.module if self.item is None else f"{self.module}:{self.item}"


@dataclass(frozen=True)
class TracedSite:
    """A site that ran, with what its module is: one row of a model's trace."""

    site: Site
    kind: str  # class name of the module
    leaf: bool
    previous: str | None  # path of the module whose output object was this module's input, if any


def parse(text: str) -> Site:
    """Read ``"path"``, ``"path:1"`` or ``"path:name"``."""
    module, colon, item = text.partition(":")
    if not colon:
        return Site(module)
    return Site(module, int(item) if item.lstrip("-").isdigit() else item)


def is_pattern(text: str) -> bool:
    """Whether the text names many modules rather than one."""
    return "*" in text


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at ``path``, or raise :class:`PathError` naming the nearest ones."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():  # not get_submodule: TensorDictModules lend the names inside them
        module = None if module is None else module._modules.get(name)
    if module is None:
        known = [name for name, _ in model.named_modules(remove_duplicate=False)]
        raise PathError(f"path {path!r} names no module of {type(model).__name__}{did_you_mean(path, known)}")
    return module


def floating_items(value: Any) -> Iterator[tuple[int | str | None, Tensor]]:
    """Yield the floating-point tensors of a module's output with their place in it (None for a bare tensor)."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield None, value
    elif isinstance(value, (tuple, list)):
        yield from ((i, v) for i, v in enumerate(value) if isinstance(v, Tensor) and v.is_floating_point())
    elif isinstance(value, Mapping):
        yield from ((str(k), v) for k, v in value.items() if isinstance(v, Tensor) and v.is_floating_point())


def pick(value: Any, site: Site) -> Tensor:
    """Return the tensor that ``site`` names in its module's output."""
    if site.item is None and isinstance(value, Tensor):
        return value
    try:  # an index into a lone tensor would be a row of the batch
        found = None if site.item is None or isinstance(value, Tensor) else value[site.item]
    except (KeyError, IndexError, TypeError):
        found = None
    if isinstance(found, Tensor):
        return found
    known = [str(Site(site.module, item)) for item, _ in floating_items(value)]
    raise PathError(
        f"{str(site)!r} names no tensor: module {site.module!r} has a {type(value).__name__} there"
        f"{did_you_mean(str(site), known)}"
    )


def eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Run without compiled code, in which hooks never fire; what was compiled stays, and is not compiled again."""
    compiled = any(part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def trace(model: nn.Module, call: Callable[[], Any]) -> tuple[TracedSite, ...]:
    """Run ``call`` once and list every site of ``model`` in the order in which the modules finished."""
    rows: dict[str, TracedSite] = {}
    gave: dict[int, str] = {}  # id of a live output -> path; `kept` keeps the ids from being reused
    kept: list[Tensor] = []

    def hook(path: str, leaf: bool, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_tensor_collection(output):
            return  # a wrapper's whole batch: what it adds is the output of a module inside
        first = args[0] if args and isinstance(args[0], Tensor) else None
        for item, tensor in floating_items(output):
            site = Site(path, item)
            previous = gave.get(id(first)) if first is not None else None
            rows.setdefault(str(site), TracedSite(site, type(module).__name__, leaf, previous))
            if leaf:
                gave[id(tensor)] = str(site)
                kept.append(tensor)

    with Undo() as undo, torch.no_grad(), eager(model):
        for path, module in model.named_modules():
            leaf = next(module.children(), None) is None
            undo.hook(module.register_forward_hook(lambda m, a, o, p=path, f=leaf: hook(p, f, m, a, o)))
        call()
    return tuple(rows.values())


@lru_cache(maxsize=4096)
def _matches(pattern: tuple[str, ...], name: tuple[str, ...]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_matches(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return bool(name) and pattern[0] in ("*", name[0]) and _matches(pattern[1:], name[1:])


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern names a module path; an item after a colon is left aside."""
    return _matches(_segments(parse(pattern).module), _segments(path))


def _segments(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()  # the empty path is the model itself


def select(rows: Sequence[TracedSite], layers: Sequence[str], *, owner: str, strict: bool = True) -> tuple[str, ...]:
    """Return the sites that the patterns name, each once, in the order in which the model runs them.

    Args:
        rows: the model's trace.
        layers: paths or patterns.
        owner: what to call the model in an error.
        strict: refuse a pattern that matches nothing.

    Raises:
        PathError: one of the patterns matches nothing that ran; names the nearest sites.
    """
    chosen: set[str] = set()
    for text in layers:
        wanted = parse(text)
        segments = _segments(wanted.module)
        found = {
            str(row.site)
            for row in rows
            if _matches(segments, _segments(row.site.module))
            and wanted.item in (None, row.site.item)
            and (row.leaf or segments[-1:] != ("**",))
        }
        if not found and strict:
            known = [str(row.site) for row in rows]
            raise PathError(f"{text!r} matches no module of {owner} that gives out numbers{did_you_mean(text, known)}")
        chosen |= found
    return tuple(str(row.site) for row in rows if str(row.site) in chosen)
