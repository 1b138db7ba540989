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


@dataclass
class _Member:
    """The tap at one module: a proxy for each of the module's floating values, made as they appear."""

    all: Proxies
    path: str
    own: dict[Place, Proxy] = field(default_factory=dict)

    @property
    def turn(self) -> Turn:
        return self.all.turn

    def meets(self, value: Any, steps: Steps) -> Any:
        for items in self._items(value):
            proxy = self.own.get(items)
            if proxy is None:
                site = Site(self.path, items)
                proxy = self.own[items] = self.all.found[str(site)] = self.all.make(site)
            value = proxy.meets(value, steps)
        return value

    def _items(self, value: Any) -> Sequence[Place]:
        wanted = self.all.items
        if isinstance(value, Tensor):
            return ((),) if value.is_floating_point() and not wanted else ()
        if isinstance(value, Arguments) and not wanted:
            return self._items(next(value.items(), (0, None))[1])  # the first argument
        if is_tensor_collection(value) and not wanted:
            return ()  # a wrapper's whole batch: what it adds is the output of a module inside
        return [items for items, _ in floating_items(value) if items[: len(wanted)] == wanted]
