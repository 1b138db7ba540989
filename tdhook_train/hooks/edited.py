"""Settings that stay on a model for a while, for whoever calls it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from tdhook_train.hooks.agents import Surroundings, agent_of
from tdhook_train.hooks.kernels import unfused
from tdhook_train.hooks.paths import Selector
from tdhook_train.hooks.place import Held, refuse_ignored, setters_at
from tdhook_train.hooks.tap import Unless
from tdhook_train.undo import Undo, parts_of

if TYPE_CHECKING:
    from tdhook_train.hooks.model import HookedModel

__all__ = ["edited"]


@contextmanager
def edited(
    model: HookedModel,
    edits: Mapping[Selector, Any],
    *,
    off: Callable[[], bool] | None,
    but: Collection[nn.Module],
    attends: bool,
) -> Iterator[None]:
    """Keep settings on a model: see :meth:`HookedModel.edited`.

    Args:
        model: whose modules are changed.
        edits: by selector.
        off: asked at every call, whether to leave that one as it is.
        but: modules that are left alone.
        attends: whether there are attention layers, which then run one by one.
    """
    around = Surroundings()
    placed = {
        selector: setters_at(model, selector, value, call="all", around=around) for selector, value in edits.items()
    }
    pairs = [pair for each in placed.values() for pair in each if pair[0] not in but]
    ran: set[bool] = set()
    with Undo() as undo:
        handles = undo.hooks()
        if edits:
            undo.enter_context(unfused(attends=attends))  # also what was compiled around it
            # behind the model: a call that an error ended may not have come to the edit
            called = Held(lambda *_: None if off and off() else ran.add(True))
            handles.append(model.module.register_forward_hook(called))
        if any(agent_of(setter.site.items) is not None for _, setter in pairs):
            handles += [part.register_forward_pre_hook(Held(around.meet)) for part in parts_of(model.module)]
        for module, setter in pairs:
            handles.append(module.register_forward_hook(Held(setter if off is None else Unless(setter, off))))
        yield
    for selector, each in placed.items():
        if ran and not any(module in but for module, _ in each):
            refuse_ignored(selector, [setter for _, setter in each])
