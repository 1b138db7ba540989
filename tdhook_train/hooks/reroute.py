"""Another way back: modules whose outputs stay as they are, and whose gradients go back by somebody's rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tdhook_train.hooks.items import floating_items

__all__ = ["Passed", "Rule", "rerouted"]


@dataclass(frozen=True)
class Passed:
    """One call of a module, as a rule sees it on the way back.

    Args:
        module: what was called.
        inputs: the floating-point tensors among its arguments, as they were given, outside any graph.
        output: what it gave out, likewise.
        again: runs the module on other inputs, the other arguments as they were.
        source: the call whose output is the first of the inputs, where a rule stands there too.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    output: Tensor
    again: Callable[..., Tensor]
    source: Passed | None = None


Rule = Callable[[Passed, Tensor], Tensor | Sequence[Tensor | None]]
"""What goes back into a module's inputs, from what comes back into its output."""


class _Rerouted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, passed: Passed, *_inputs: Tensor) -> Tensor:
        ctx.rule, ctx.passed = rule, passed
        return passed.output.clone()  # a new tensor: the output itself may be one of the inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            back = ctx.rule(ctx.passed, gradient)
        return None, None, *([back] if isinstance(back, Tensor) else back)


@dataclass
class _Detour:
    """The hooks of one module; calls may be nested, where a module is in itself."""

    rule: Rule
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def into(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the arguments, and let the module work on copies outside the graph."""
        self.given.append((args, kwargs))
        fresh = getattr(module, "inplace", False)
        return _detached(args, fresh=fresh), _detached(kwargs, fresh=fresh)

    def past(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """Put the output into the graph, the rule behind it."""
        args, kwargs = self.given.pop()
        places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]
        inputs = tuple(args[i] for i in places)

        def again(*values: Tensor) -> Tensor:
            new = list(_detached(args, fresh=False))
            for i, value in zip(places, values, strict=True):
                new[i] = value
            with torch.enable_grad():
                return module.forward(*new, **_detached(kwargs, fresh=False))

        outside = tuple(value.detach() for value in inputs)
        if isinstance(output, Tensor):
            source = getattr(inputs[0].grad_fn, "passed", None) if inputs else None
            return _Rerouted.apply(self.rule, Passed(module, outside, output.detach(), again, source), *inputs)
        tensors = [tensor for _, tensor in floating_items(output)]
        raise TypeError(f"{type(module).__name__} gives out {len(tensors)} tensors, and a rule goes by one")


def rerouted(rules: Mapping[nn.Module, Rule]) -> list[RemovableHandle]:
    """Give modules another way back; what they give out stays the same, bit for bit.

    Args:
        rules: by module. The module itself runs outside the graph, so that its parameters get no gradient.

    Returns:
        the handles of the hooks, to be removed.
    """
    handles = []
    for module, rule in rules.items():
        detour = _Detour(rule)
        handles.append(module.register_forward_pre_hook(detour.into, with_kwargs=True))
        handles.append(module.register_forward_hook(detour.past, with_kwargs=True))
    return handles


def _detached(given: Any, *, fresh: bool) -> Any:
    if isinstance(given, Tensor):
        return given.detach().clone() if fresh else given.detach()
    if type(given) in (tuple, list):
        return type(given)(_detached(one, fresh=fresh) for one in given)
    return {key: _detached(one, fresh=fresh) for key, one in given.items()} if type(given) is dict else given
