"""The order in which a model runs its modules, and what a selection names in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensordict import is_tensor_collection
from torch import Tensor, nn

from tdhook_train.errors import PathError, did_you_mean
from tdhook_train.hooks.agents import Agents
from tdhook_train.hooks.items import floating_items
from tdhook_train.hooks.kernels import untouched
from tdhook_train.hooks.paths import Selector, Site, chooser, is_leaf, is_pattern, parse, shown, walk
from tdhook_train.undo import parts_of

__all__ = ["TracedSite", "select", "trace"]


@dataclass(frozen=True)
class TracedSite:
    """A site that ran, with what its module is: one row of a model's trace."""

    site: Site
    module: nn.Module = field(repr=False, compare=False)
    paths: tuple[str, ...]  # every name of the module, the site's own first
    previous: str | None  # site of the module whose output object was this module's input, if any
    size: int = 0  # numbers that it gives out for a row of the batch


def trace(model: nn.Module, call: Callable[[], Any], batch: tuple[int, ...] = ()) -> tuple[TracedSite, ...]:
    """Run ``call`` once and list every site of ``model`` in the order in which the modules finished.

    Args:
        model: whose modules are listed.
        call: runs it.
        batch: size of the batch that it runs on, behind which a value may have a dimension of agents.
    """
    rows: dict[str, TracedSite] = {}
    gave: dict[int, str] = {}  # id of a live output -> site; `kept` keeps the ids from being reused
    kept: list[Tensor] = []
    named: dict[nn.Module, list[str]] = {}
    for path, module in walk(model):
        named.setdefault(module, []).append(path)
    agents, total = Agents(named, batch), max(1, math.prod(batch))

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_tensor_collection(output):
            return  # a wrapper's whole batch: what it adds is the output of a module inside
        first = args[0] if args and isinstance(args[0], Tensor) else None
        paths = tuple(named[module])
        for items, tensor in floating_items(output):
            for place in agents.places(module, items, tensor):
                site = Site(paths[0], place)
                previous = gave.get(id(first)) if first is not None and place == items else None
                rows.setdefault(str(site), TracedSite(site, module, paths, previous, tensor.numel() // total))
            if is_leaf(module):
                gave[id(tensor)] = str(Site(paths[0], items))
                kept.append(tensor)

    with untouched(parts_of(model), graph=False) as undo:
        handles = undo.hooks()
        for module in named:
            handles.append(module.register_forward_hook(hook))
        call()
    return tuple(rows.values())


def select(
    rows: Sequence[TracedSite], layers: Sequence[Selector], *, owner: str, strict: bool = True
) -> tuple[str, ...]:
    """Return the sites that the selectors name, each once, in the order in which the model runs them.

    A shared module is found under any of its names: a path keeps the name that it was given, a pattern, class or
    predicate gives the first.

    Args:
        rows: the model's trace.
        layers: paths, patterns, classes or predicates.
        owner: what to call the model in an error.
        strict: refuse a selector that matches nothing.

    Raises:
        PathError: one of the selectors matches nothing that ran; names the nearest sites.
    """
    chosen: dict[int, list[str]] = {}  # row -> the names it was asked for by
    for selector in layers:
        name_of = _naming(selector)
        found = [(i, name) for i, row in enumerate(rows) if (name := name_of(row)) is not None]
        if not found and strict:
            known = [str(Site(path, row.site.items)) for row in rows for path in row.paths]
            near = did_you_mean(selector, known) if isinstance(selector, str) else ""
            raise PathError(f"{shown(selector)} matches no module of {owner} that gives out numbers{near}")
        for i, name in found:
            chosen.setdefault(i, []).append(name)
    return tuple(name for i in sorted(chosen) for name in dict.fromkeys(chosen[i]))


def _naming(selector: Selector) -> Callable[[TracedSite], str | None]:
    """Return the name by which the selector means a row, or None where it does not."""
    asked = parse(selector) if isinstance(selector, str) else Site("")
    exact, wanted = not is_pattern(selector), chooser(selector)

    def name_of(row: TracedSite) -> str | None:
        if row.site.items[: len(asked.items)] != asked.items:
            return None
        if exact:
            return str(Site(asked.module, row.site.items)) if asked.module in row.paths else None
        return str(row.site) if any(wanted(path, row.module) for path in row.paths) else None

    return name_of
