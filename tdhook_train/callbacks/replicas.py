"""The replicas of a model in several processes, kept in step where the first process changes its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from tdhook_train.edit import Rewrite
from tdhook_train.observer import LiveEdit
from tdhook_train.observer.live_edit import Span

__all__ = ["Replicas"]


class Replicas:
    """Does to this process's replica what the first process's observer did to its own.

    Args:
        edits: of the observer, by name.
        first: whether this is the first process, whose observer holds its spans itself.
    """

    def __init__(self, edits: Mapping[str, LiveEdit], *, first: bool) -> None:
        self._edits = dict(edits)
        self._first = first
        self._writes = any(isinstance(edit.edit, Rewrite) for edit in self._edits.values())
        self._held: dict[str, tuple[ExitStack, int | None]] = {}

    def follow(
        self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], spans: Mapping[str, int | None]
    ) -> None:
        """Hold what the first process holds, and take over what it wrote.

        Args:
            model: this process's.
            optimizers: of its weights.
            spans: held in the first process, and the step at which each ends.
        """
        if not self._first:
            for name in set(self._held) - set(spans):
                self._held.pop(name)[0].close()
            for name, until in spans.items():
                held = self._held[name][0] if name in self._held else self._edits[name].held(model, Span())
                self._held[name] = (held, until)
        if self._writes:
            for value in _written(model, optimizers):
                torch.distributed.broadcast(value, 0)

    def end(self, step: int) -> None:
        """End the spans that are over at a step."""
        for name in [name for name, (_, until) in self._held.items() if until is not None and step >= until]:
            self._held.pop(name)[0].close()

    def close(self) -> None:
        """End every span."""
        with ExitStack() as each:  # all of them, whatever one of them raises
            while self._held:
                each.callback(self._held.popitem()[1][0].close)


def _written(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """What a :class:`~tdhook_train.edit.Rewrite` writes: parameters, and what optimizers keep of each entry."""
    found = [parameter.data for parameter in model.parameters()]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                kept = optimizer.state.get(parameter, {}).values()
                found += [
                    state
                    for state in kept
                    if isinstance(state, Tensor) and state.shape == parameter.shape and state.device == parameter.device
                ]
    return found
