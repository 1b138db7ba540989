"""A private copy of a network that takes on the live weights when asked."""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_train.errors import NetworkError
from tdhook_train.isolation.drawing import accompanied
from tdhook_train.isolation.networks import Network
from tdhook_train.undo import kept_rng

__all__ = ["Shadow", "private_copy", "take_over"]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def private_copy(module: nn.Module) -> nn.Module:
    """Copy a module for measurement: evaluation mode, no gradients for weights, nobody's hooks, not compiled.

    Raises:
        NetworkError: the module cannot be copied.
    """
    # hooks are left out of the copy, not copied and cleared: they may hold what cannot or should not be copied
    hooks = [getattr(part, name) for part in module.modules() for name in _HOOKS if hasattr(part, name)]
    with nullcontext() if accompanied() else kept_rng(()):  # a copy hardly ever draws, another thread may
        try:
            twin = copy.deepcopy(module, {id(hook): _own(hook) for hook in hooks} | _computed(module))
        except (RuntimeError, TypeError) as error:
            raise NetworkError(f"{type(module).__name__} cannot be copied for observation: {error}") from error
    for part in twin.modules():
        part._compiled_call_impl = None
    return twin.eval().requires_grad_(False)


def _own(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    """Copy the hooks that are part of a network: those by which torch computes a weight (spectral_norm, pruning)."""
    own = {key: hook for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils.")}
    return OrderedDict((key, copy.deepcopy(hook)) for key, hook in own.items())


def _computed(module: nn.Module) -> dict[int, Tensor]:
    """Copy what a module keeps of its last call, such as a weight that a hook computed; deepcopy refuses graphs."""
    kept = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return {id(value): value.detach().clone() for value in kept if not value.is_leaf}


class Shadow:
    """A private copy of one network with a snapshot of its weights; about 0.2 ms to refresh two MLPs.

    The live network is never run, hooked or edited: its weights are read and copied, nothing else.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self.module = private_copy(network.module)
        self.refresh()

    def refresh(self) -> None:
        """Copy the live weights and buffers into the private copy, which follows their dtype and device as well."""
        take_over(self.module, self._network.weights())


def take_over(module: nn.Module, weights: TensorDictBase, *, values: bool = True) -> None:
    """Give a module copies of weights and buffers.

    Args:
        module: nobody else's.
        weights: of a module of the same structure.
        values: False takes over dtype and device alone.
    """
    live = weights.flatten_keys(".")
    with torch.no_grad():
        for key, mine in TensorDict.from_module(module).flatten_keys(".").items():
            now = live.get(key)
            if (mine.dtype, mine.device) != (now.dtype, now.device):
                mine.data = mine.data.to(now)
            if values:
                mine.data.copy_(now)
