"""Many sites under one name: what a pattern, a class or a predicate reads in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensordict import is_tensor_collection
from torch import Tensor

from tdhook_train.errors import ResolveError
from tdhook_train.hooks.arguments import Arguments
from tdhook_train.hooks.items import Place, floating_items
from tdhook_train.hooks.paths import Selector, Site, parse, shown
from tdhook_train.hooks.tap import Proxy, Steps, Turn

__all__ = ["Proxies"]


@dataclass
class Proxies:
    """The values of all sites that a selector names, in the order in which the model runs them."""

    selector: Selector
    make: Callable[[Site], Proxy]
    turn: Turn
    found: dict[str, Proxy] = field(default_factory=dict)
    done: bool = False

    def __post_init__(self) -> None:
        self.items = parse(self.selector).items if isinstance(self.selector, str) else ()

    def resolve(self) -> dict[str, Any]:
        """Return the values by site.

        Raises:
            ResolveError: the pass has not run yet, or ran none of the modules.
        """
        if not self.done:
            raise ResolveError(f"{shown(self.selector)} has no values yet: the pass runs when its `with` block ends")
        values = {site: proxy.resolve() for site, proxy in self.found.items() if proxy.found}
        if not values:
            raise ResolveError(f"{shown(self.selector)}: no module that it names gave out numbers in this pass")
        return values

    def at(self, path: str) -> _Member:
        """Return the tap of one module."""
        return _Member(self, path)

    def finish(self) -> None:
        """End the pass for every proxy, and forget how to make more."""
        self.done = True
        self.make = Proxy
        for proxy in self.found.values():
            proxy.finish()


class _Member:
    """The tap at one module: a proxy for each of the module's floating values, listed as they appear."""

    __slots__ = ("all", "own", "path", "turn", "whole")

    def __init__(self, all_: Proxies, path: str) -> None:
        self.all, self.path, self.turn = all_, path, all_.turn
        self.whole = None if all_.items else all_.make(Site(path))  # for a module that gives out a bare tensor
        self.own: dict[Place, Proxy] | None = None  # for one that gives out several

    def meets(self, value: Any, steps: Steps) -> Any:
        proxy = self.whole
        if proxy is not None and isinstance(value, Tensor):
            if not value.is_floating_point():
                return value
            if not proxy.calls:
                self.all.found[self.path] = proxy
            return proxy.meets(value, steps)
        for items in self._items(value):
            value = self._at(items).meets(value, steps)
        return value

    def _at(self, items: Place) -> Proxy:
        self.own = {} if self.own is None else self.own
        if items not in self.own:
            site = Site(self.path, items)
            self.own[items] = self.all.found[str(site)] = self.all.make(site)
        return self.own[items]

    def _items(self, value: Any) -> Sequence[Place]:
        wanted = self.all.items
        if isinstance(value, Arguments) and not wanted:
            first = next(value.items(), (0, None))[1]
            return ((),) if isinstance(first, Tensor) and first.is_floating_point() else ()
        if is_tensor_collection(value) and not wanted:
            return ()  # a wrapper's whole batch: what it adds is the output of a module inside
        return [items for items, _ in floating_items(value) if items[: len(wanted)] == wanted]
