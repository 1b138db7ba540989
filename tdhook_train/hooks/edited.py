"""Settings that stay on a model for a while, for whoever calls it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tdhook_train.hooks.agents import Surroundings, agent_of
from tdhook_train.hooks.kernels import layer_by_layer
from tdhook_train.hooks.paths import Selector
from tdhook_train.hooks.place import place, refuse_ignored, setters_at
from tdhook_train.undo import Undo, parts_of

if TYPE_CHECKING:
    from tdhook_train.hooks.model import HookedModel

__all__ = ["edited"]


@contextmanager
def edited(model: HookedModel, edits: Mapping[Selector, Any], *, attends: bool) -> Iterator[None]:
    """Keep settings on a model: see :meth:`HookedModel.edited`.

    Args:
        model: whose modules are changed.
        edits: by selector.
        attends: whether there are attention layers, which then run one by one.
    """
    around = Surroundings()
    placed = {
        selector: setters_at(model, selector, value, call="all", around=around) for selector, value in edits.items()
    }
    setters = [setter for pairs in placed.values() for _, setter in pairs]
    ran: set[bool] = set()
    with Undo() as undo:
        handles = undo.hooks()
        if edits:
            undo.enter_context(torch.compiler.set_stance("force_eager"))  # also of what was compiled around it
            undo.enter_context(layer_by_layer(attends=attends, recurs=False))
            handles.append(model.module.register_forward_pre_hook(lambda *_: ran.add(True)))
        if any(agent_of(setter.site.items) is not None for setter in setters):
            handles += [part.register_forward_pre_hook(around.meet) for part in parts_of(model.module)]
        for module, setter in (pair for pairs in placed.values() for pair in pairs):
            handles.append(place(module, "output", [setter]))
        yield
    for selector, pairs in placed.items():
        if ran:
            refuse_ignored(selector, [setter for _, setter in pairs])
