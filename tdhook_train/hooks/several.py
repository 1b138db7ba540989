"""Many sites under one name: what a pattern, a class or a predicate reads in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tensordict import is_tensor_collection
from torch import Tensor

from tdhook_train.errors import ResolveError
from tdhook_train.hooks.arguments import Arguments
from tdhook_train.hooks.items import floating_items
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


@dataclass
class _Member:
    """The tap at one module: a proxy for each of the module's floating values, made as they appear."""

    all: Proxies
    path: str

    @property
    def turn(self) -> Turn:
        return self.all.turn

    def meets(self, value: Any, steps: Steps) -> Any:
        for items in self._items(value):
            site = Site(self.path, items)
            if str(site) not in self.all.found:
                self.all.found[str(site)] = self.all.make(site)
            value = self.all.found[str(site)].meets(value, steps)
        return value

    def _items(self, value: Any) -> list[tuple[int | str, ...]]:
        wanted = parse(self.all.selector).items if isinstance(self.all.selector, str) else ()
        if isinstance(value, Arguments) and not wanted:
            first = next(value.items(), (0, None))
            return [()] if isinstance(first[1], Tensor) and first[1].is_floating_point() else []
        if is_tensor_collection(value) and not wanted:
            return []  # a wrapper's whole batch: what it adds is the output of a module inside
        return [items for items, _ in floating_items(value) if items[: len(wanted)] == wanted]
