"""Another way back: modules whose outputs stay as they are, and whose gradients go back by somebody's rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_train.errors import NetworkError
from tdhook_train.hooks.items import floating_items
from tdhook_train.undo import Undo

__all__ = ["Detour", "Passed", "Rule", "rerouted"]

_ONE = "a rule goes by tensors, and by one that is given out"


@dataclass(frozen=True)
class Passed:
    """One call of a module, as a rule sees it on the way back.

    Args:
        module: what was called.
        inputs: the floating-point tensors among its arguments, by place or by name, as they were given, outside any
            graph.
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


class Detour:
    """What is called in place of a module's ``forward``, so that hooks on either side of it see the graph.

    Args:
        module: whose outputs stay the same, bit for bit.
        rule: what goes back.
    """

    def __init__(self, module: nn.Module, rule: Rule) -> None:
        self.module, self.rule, self.forward = module, rule, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the module on copies outside the graph, and put what it gives out into the graph, the rule behind it.

        Raises:
            NetworkError: it takes or gives out tensors inside something else, which no rule can tell apart.
        """
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        self._refuse_nested(given)
        places = [key for key, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()]
        inputs = tuple(given[key] for key in places)
        inplace = bool(getattr(self.module, "inplace", False))
        fresh = _outside(given, copied=inplace)
        outside = tuple(fresh[key].clone() if inplace else fresh[key] for key in places)
        with torch.no_grad():
            output = self._called(fresh)
        if not isinstance(output, Tensor):
            count = len(list(floating_items(output)))
            raise NetworkError(f"{self._title} gives out {count} tensors in a {type(output).__name__}; {_ONE}")

        def again(*values: Tensor) -> Tensor:
            with torch.enable_grad():
                new = [value.clone() for value in values] if inplace else values
                return self._called(_outside(given, copied=inplace) | dict(zip(places, new, strict=True)))

        source = getattr(inputs[0].grad_fn, "passed", None) if inputs else None
        passed = Passed(self.module, outside, output.detach(), again, source)
        found: Any = _Rerouted.apply(self.rule, passed, *inputs)
        if inplace and inputs and not (inputs[0].is_leaf and inputs[0].requires_grad):
            return inputs[0].copy_(found)  # the caller may go on with what it passed in
        return found

    def _called(self, given: dict[Any, Any]) -> Any:
        args = [value for key, value in given.items() if isinstance(key, int)]
        return self.forward(*args, **{key: value for key, value in given.items() if not isinstance(key, int)})

    def _refuse_nested(self, given: dict[Any, Any]) -> None:
        for key, value in given.items():
            if not isinstance(value, Tensor) and any(tensor.requires_grad for _, tensor in floating_items(value)):
                raise NetworkError(f"{self._title} takes tensors in a {type(value).__name__} ({key!r}); {_ONE}")

    @property
    def _title(self) -> str:
        return type(self.module).__name__


def rerouted(rules: Mapping[nn.Module, Rule], undo: Undo) -> None:
    """Give modules another way back; what they give out stays the same, bit for bit.

    Args:
        rules: by module. The module itself runs outside the graph, so that its parameters get no gradient.
        undo: takes the changes back.
    """
    for module, rule in rules.items():
        undo.set(module, "forward", Detour(module, rule))


def _outside(given: dict[Any, Any], *, copied: bool) -> dict[Any, Any]:
    out = {key: value.detach() if isinstance(value, Tensor) else value for key, value in given.items()}
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in out.items()} if copied else out
