"""Gradients inside a pass: read, bent on their way back, for one target or many, without touching ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from tdhook_train.errors import ResolveError, TargetError, did_you_mean
from tdhook_train.hooks.agents import one_of
from tdhook_train.hooks.items import pick, put
from tdhook_train.hooks.members import Members
from tdhook_train.hooks.sequences import end_to_end
from tdhook_train.hooks.setter import Setter
from tdhook_train.hooks.tap import Proxy, Steps, Turn, in_graph
from tdhook_train.keys import by_name, dotted, split_key
from tdhook_train.undo import remove_all

__all__ = ["GradientProxy", "GradientSetter", "Objective", "differentiate", "proxies_of"]

Objective = Any  # a function of the outputs, a key of them, a proxy; or a list or a mapping of these


@dataclass
class _Node:
    """Where in the graph a gradient passes, and how the tensor there looks."""

    value: Tensor
    members: Members | None
    onward: Any  # what the module gives out from here on

    @classmethod
    def at(cls, output: Any, tap: Proxy | Setter, steps: Steps) -> _Node:
        """Make a place for a tap in the graph of the pass: a copy goes on, as a step of its own.

        The tensor itself would not do: it may be what went into the module as well, with other readers; it may be
        somebody's leaf, or need no gradient; and what works in place after it could take it out of the graph.
        """
        tensor = pick(output, tap.site)
        if id(tensor) in steps.nodes:  # another tap's: those of one place see its gradient in the order written
            return replace(steps.nodes[id(tensor)], onward=output)
        members = Members.of(tensor, tap.batch)
        if not tensor.is_floating_point():
            raise TargetError(f"{tap.where} does not exist: the value is {tensor.dtype}")
        value = in_graph(tensor if members is None else members.raw)
        onward = value if members is None else members.hidden(members.seen(value))
        steps.nodes[id(onward)] = cls(value, members, put(output, tap.site.items, onward, steps.given))
        return steps.nodes[id(onward)]

    def watch(self, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call ``function`` with each gradient that comes back here, members first; what it returns goes on."""
        members = self.members
        if members is None:
            return self.value.register_hook(function)

        def hook(gradient: Tensor) -> Tensor | None:
            changed = function(members.seen(gradient))
            return None if changed is None else members.unseen(changed)

        return self.value.register_hook(hook)

    def like(self) -> Tensor:
        """Return a tensor that looks like a gradient here and takes no memory."""
        nothing = self.value.detach().new_empty(()).expand(self.value.shape)
        return nothing if self.members is None else self.members.seen(nothing)


@dataclass
class _Watch:
    """One call of a module, seen from behind: where its gradient passes and what it would look like."""

    edge: GradientEdge
    like: Tensor
    arrived: Tensor | None = None

    def takes(self, proxy: GradientProxy, gradient: Tensor) -> None:
        self.arrived = proxy.keep.of(end_to_end(one_of(gradient, proxy.site, proxy.batch), proxy.sequences), proxy)


@dataclass
class GradientProxy(Proxy):
    """The gradient of what is differentiated with respect to a value; several targets are stacked in front."""

    turn: ClassVar[Turn] = Turn.DIFFERENTIATE

    watches: list[_Watch] = field(default_factory=list)
    targets: list[list[Tensor]] = field(default_factory=list)  # target -> call -> gradient
    handles: list[RemovableHandle] = field(default_factory=list)
    asked: bool = False  # whether anything was differentiated in this pass

    def _why_absent(self) -> str:
        if self.asked and self.reached:
            return ": gradients are off where its module runs (torch.no_grad, or reentrant checkpointing)"
        return " was never asked for: call run.backward(...)" if self.calls else super()._why_absent()

    def meets(self, value: Any, steps: Steps) -> Any:
        """Watch the gradient of this call."""
        if not self.takes() or not torch.is_grad_enabled():
            return value
        node = _Node.at(value, self, steps)
        watch = _Watch(get_gradient_edge(node.value), node.like())
        self.watches.append(watch)
        self.handles.append(node.watch(lambda gradient: watch.takes(self, gradient)))
        return node.onward

    def collect(self) -> None:
        """Take what arrived for one target; zeros for a call on which the target does not depend."""
        for watch in self.watches:
            if watch.arrived is None:
                watch.takes(self, torch.zeros_like(watch.like))
        self.targets.append([cast(Tensor, watch.arrived) for watch in self.watches])
        for watch in self.watches:
            watch.arrived = None

    def settle(self, *, many: bool) -> None:
        """Make the values: one a call, with a leading dimension of targets where there are several."""
        self.asked, calls = True, zip(*self.targets, strict=True)
        self.found = [torch.stack(gradients) if many else gradients[0] for gradients in calls]

    def finish(self) -> None:
        """Let go of the graph."""
        super().finish()
        remove_all(self.handles)
        self.watches, self.targets = [], []


@dataclass
class GradientSetter(Setter):
    """A pending change of a gradient on its way back."""

    turn: ClassVar[Turn] = Turn.DIFFERENTIATE

    handles: list[RemovableHandle] = field(default_factory=list)

    def meets(self, value: Any, steps: Steps) -> Any:
        """Bend the gradient of this call."""
        if not self.takes() or not torch.is_grad_enabled():
            return value
        node = _Node.at(value, self, steps)
        self.handles.append(node.watch(self.changed))
        return node.onward

    def _takes_again(self) -> bool:
        return False  # the graph is the one of the first time

    def why_ignored(self) -> str:
        """Say why no gradient was bent."""
        if self.reached:
            return "no gradient came back through it; read one with run.get_grad(...) and call run.backward(...)"
        return super().why_ignored()

    def finish(self) -> None:
        """Leave a graph that somebody keeps as it would have been."""
        remove_all(self.handles)


def proxies_of(objective: Objective) -> list[Proxy]:
    """List the values of the pass that are differentiated themselves."""
    return [one for one in _several(objective) or [objective] if isinstance(one, Proxy)]


def differentiate(
    objective: Objective, output: TensorDictBase | None, wanted: Sequence[GradientProxy], *, keep_graph: bool
) -> None:
    """Read the gradients of every target, one backward pass each over the one graph.

    Args:
        objective: what is differentiated.
        output: of the pass; None where it was stopped.
        wanted: the gradients to read.
        keep_graph: whether somebody differentiates through the pass later.

    Raises:
        TargetError: a target is not one number, or the pass was stopped before the outputs that it needs.
    """
    several = _several(objective)
    totals = [_number(one, output) for one in (several if several is not None else [objective])]
    edges = list(dict.fromkeys(watch.edge for proxy in wanted for watch in proxy.watches))
    further = any(not proxy.keep.detach for proxy in wanted)
    for i, total in enumerate(totals):
        if edges and total.requires_grad:
            again = keep_graph or further or i < len(totals) - 1
            torch.autograd.grad(total, edges, retain_graph=again, create_graph=further, allow_unused=True)
        for proxy in wanted:
            proxy.collect()
    for proxy in wanted:
        proxy.settle(many=several is not None)


def _several(objective: Objective) -> list[Any] | None:
    found = list(objective.values()) if isinstance(objective, Mapping) else objective
    if found == []:
        raise TargetError("backward() was given no target to differentiate")
    return found if isinstance(found, list) else None


def _number(objective: Any, output: TensorDictBase | None) -> Tensor:
    if isinstance(objective, Proxy):
        if not objective.live:
            raise ResolveError(f"{objective.where}, which backward() differentiates, was never reached")
        total: Any = objective.live[-1]
    elif output is None:
        raise TargetError("backward() needs the outputs, but the pass was stopped before them")
    else:
        total = objective(output) if callable(objective) else _sum_of(objective, output)
    if isinstance(total, Tensor) and not total.is_floating_point() and not total.is_complex():
        raise TargetError(f"backward() differentiates a floating-point number, got {total.dtype}")
    if not isinstance(total, Tensor) or total.numel() != 1:
        given = f"shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
        raise TargetError(f"backward() differentiates one number, got {given}; sum it, or give a list of targets")
    return total


def _sum_of(key: Any, output: TensorDictBase) -> Tensor:
    """Sum an output, or a feature of it, over everything else: rows that do not mix keep their own gradients."""
    name, features = split_key(key)
    if name not in output.keys(include_nested=True):
        near = did_you_mean(dotted(name), by_name(output))
        raise TargetError(f"backward() of {dotted(name)!r}, which is no output{near}")
    value = output.get(name)
    try:
        return value[(..., *features)].sum() if features else value.sum()
    except IndexError as error:
        raise TargetError(f"backward() of {key!r}: the output has shape {tuple(value.shape)}") from error
