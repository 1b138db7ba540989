"""Weights drawn anew, as modules draw them when they are made, from a seed of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DrawnFrom", "redraw"]

_PRIVATELY = (nn.MultiheadAttention, nn.Transformer)


class DrawnFrom(TorchDispatchMode):
    """Let what is drawn meanwhile come from one seed: other threads may use the generators of the process."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed, self._generators = seed, dict[torch.device, torch.Generator]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(one.name == "generator" for one in func._schema.arguments):
            device = next((value.device for value in args if isinstance(value, Tensor)), torch.device("cpu"))
            if device not in self._generators:
                self._generators[device] = torch.Generator(device).manual_seed(self._seed)
            kwargs["generator"] = self._generators[device]
        return func(*args, **kwargs)


def redraw(module: nn.Module, seed: int) -> list[str]:
    """Let every part of a module that nobody else has draw its weights anew, a whole after its parts.

    Returns:
        the names of the parameters that no part knows how to draw: they are as they were.
    """
    drawn: set[Tensor] = set()
    with DrawnFrom(seed), torch.no_grad():
        for part in reversed(list(module.modules())):
            reset = getattr(part, "_reset_parameters" if isinstance(part, _PRIVATELY) else "reset_parameters", None)
            if callable(reset) and not is_parametrized(part):  # what computes a weight would throw the new one away
                reset()
                drawn.update(part.parameters())
    return [name for name, parameter in module.named_parameters() if parameter not in drawn]
