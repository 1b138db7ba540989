"""What methods share whose gradients go back by a rule at activations: which modules, and what no rule reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_train.errors import NetworkError
from tdhook_train.explain.here import gradients_here
from tdhook_train.explain.problem import Point, Problem, Rules
from tdhook_train.hooks import HookedModel
from tdhook_train.hooks.reroute import Rule

__all__ = ["Watched", "functions_in", "relu_gradients", "relu_rules"]

_RELUS = (nn.ReLU, nn.ReLU6)
_ACTIVATIONS = {
    "ReluBackward": "relu", "TanhBackward": "tanh", "SigmoidBackward": "sigmoid", "GeluBackward": "gelu",
    "SiluBackward": "silu", "EluBackward": "elu", "LeakyReluBackward": "leaky_relu", "SoftplusBackward": "softplus",
    "HardtanhBackward": "hardtanh", "MishBackward": "mish", "HardsigmoidBackward": "hardsigmoid",
    "HardswishBackward": "hardswish", "LogSigmoidBackward": "logsigmoid", "SoftmaxBackward": "softmax",
    "LogSoftmaxBackward": "log_softmax", "MaxPool2DWithIndicesBackward": "max_pool", "MulBackward": "a product",
    "BmmBackward": "a product", "ScaledDotProductFlashAttentionForCpuBackward": "attention",
}  # fmt: skip


@dataclass
class Watched:
    """A problem that keeps the columns of its last pass: their values, and the graph that they come out of."""

    of: Problem
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def problem(self) -> Problem:
        """The problem, watched."""
        return replace(self.of, read=self._read)

    def _read(self, outputs: TensorDictBase, batch: TensorDictBase) -> dict[str, Tensor]:
        self.columns = self.of.read(outputs, batch)
        return self.columns


def functions_in(columns: Iterable[Tensor], only: Iterable[str] = tuple(_ACTIVATIONS.values())) -> list[str]:
    """Name the activations that were called as functions in the graph of some values, where no rule holds.

    A module that goes by a rule runs outside the graph, so that its own function is not in there.
    """
    wanted, found = set(only), dict[str, None]()
    waiting: list[Any] = [column.grad_fn for column in columns]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        name = _ACTIVATIONS.get(node.name().rstrip("0123456789"))
        if name in wanted:
            found[name] = None
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        waiting += new
    return list(found)


def relu_rules(method: str, model: HookedModel, rule: Rule) -> Rules:
    """Give every ReLU of a model a rule.

    Raises:
        NetworkError: it has none; says what it has.
    """
    parts = list(model.module.modules())
    rules: dict[nn.Module, Rule] = {part: rule for part in parts if isinstance(part, _RELUS)}
    if not rules:
        kinds = Counter(type(part).__name__ for part in parts if not list(part.children()))
        there = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no modules"
        raise NetworkError(
            f"{method} goes by nn.ReLU; {model.title} has {there} (what forward calls as a function is out of reach)"
        )
    return rules


def relu_gradients(method: str, problem: Problem, rule: Rule) -> Point:
    """Differentiate every target at every site, with a rule at every ReLU: ``[row, target, *feature]``.

    Raises:
        NetworkError: there is no ReLU, or one that is called as a function.
    """
    watched = Watched(problem)
    grads = gradients_here(watched.problem, relu_rules(method, problem.model, rule))
    if functions_in(watched.columns.values(), ["relu"]):
        raise NetworkError(
            f"{method} goes by nn.ReLU; {problem.model.title} also calls relu as a function in its forward, "
            "which no rule reaches: make it a module"
        )
    return grads


def passes(output: Tensor, module: nn.Module) -> Tensor:
    """Say where a ReLU let its input through."""
    most = module.max_val if isinstance(module, nn.ReLU6) else torch.inf
    return (output > 0) & (output < most)
