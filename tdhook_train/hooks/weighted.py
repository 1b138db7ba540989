"""Which layers hold weights."""

from __future__ import annotations

from tdhook_train.hooks.model import HookedModel
from tdhook_train.hooks.paths import Selection, is_pattern, selectors

__all__ = ["with_weights"]


def with_weights(model: HookedModel, layers: Selection) -> dict[str, bool]:
    """Return the paths of the layers with weights, and of each whether all that lies below it counts.

    Args:
        model: a network.
        layers: as a method takes them; a path counts with all that lies below it. Those of other networks are left out.
    """
    found: dict[str, bool] = {}
    for selector in selectors(layers):
        if not model.has(selector):
            continue  # of another network
        below = isinstance(selector, str) and not is_pattern(selector)
        own = [("", model.module)] if selector == "**" else []  # parameters that lie in no part of it
        for path, module in [*own, *model.chosen(selector)]:
            if any(True for _ in module.parameters(recurse=below)):
                found.setdefault(path, below)
    return found
