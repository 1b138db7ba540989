"""Values of several agents in one tensor, behind the dimensions of the batch: ``"path:agent 0"`` names the first's.

TorchRL's multi-agent networks (``MultiAgentMLP`` and the like) run all agents at once. They are known by saying how
many agents they have, and along which dimension, so that TorchRL need not be imported.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from tensordict import is_tensor_collection
from torch import Tensor, nn

from tdhook_train.errors import PathError
from tdhook_train.hooks.members import Members
from tdhook_train.hooks.paths import Site

__all__ = ["Agents", "Surroundings", "agent_of", "one_of", "with_one", "without_agent"]

_ITEM = re.compile(r"agent (\d+)")

Items = tuple[int | str, ...]


@lru_cache(maxsize=4096)
def agent_of(items: Items) -> int | None:
    """Return the agent that a site's items name."""
    found = _ITEM.fullmatch(items[-1]) if items and isinstance(items[-1], str) else None
    return None if found is None else int(found[1])


def without_agent(items: Items) -> Items:
    """Return the way to the tensor that holds all agents."""
    return items if agent_of(items) is None else items[:-1]


def one_of(value: Tensor, site: Site, batch: tuple[int, ...], members: int = 0) -> Tensor:
    """Return the part of a value that belongs to the agent that a site names; all of it where it names none.

    Args:
        value: with everything that vmap hides in sight.
        site: may name an agent.
        batch: its size.
        members: dimensions of an ensemble between the batch and the agents.

    Raises:
        PathError: the value has no such agent.
    """
    agent = agent_of(site.items)
    if agent is None:
        return value
    axis = _axis(value, batch) + members
    if value.ndim < axis + 2 or not agent < value.shape[axis]:
        raise PathError(f"{str(site)!r} names no agent: the value has shape {tuple(value.shape)}, the batch {batch}")
    return value.select(axis, agent)


def with_one(value: Tensor, new: Tensor, site: Site, batch: tuple[int, ...], members: int = 0) -> Tensor:
    """Return a value with the part of the site's agent replaced, in each copy where ``new`` carries copies in front."""
    agent, axis = agent_of(site.items), _axis(value, batch) + members
    if agent is None:
        return new
    if new.ndim == value.ndim:
        value, axis = value.expand(len(new), *value.shape), axis + 1
    return value.select_scatter(new, axis, agent)


def _axis(value: Tensor, batch: tuple[int, ...]) -> int:
    return len(batch) if tuple(value.shape[: len(batch)]) == batch else 0  # vmap hides the batch: agents in front


class Surroundings(threading.local):
    """What stands before the agents in a live model's values, as its modules are called: each thread on its own.

    A multi-agent network says by its input where the agents begin, a TensorDictModule by the batch size.
    """

    batch: tuple[int, ...] = ()
    level = 0  # how deep in vmap the caller is, as a loss is for an ensemble; the agents' own vmap lies deeper

    def meet(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Take note of a call, as a forward pre-hook."""
        first: Any = args[0] if args else None
        if is_tensor_collection(first):
            self.batch = tuple(first.batch_size)
        elif isinstance(first, Tensor) and _has_agents(module):
            self.batch = tuple(first.shape[: module.agent_dim])
        else:
            return
        self.level = torch._C._functorch.maybe_current_level() or 0


def _has_agents(net: nn.Module) -> bool:
    return isinstance(getattr(net, "n_agents", None), int) and isinstance(getattr(net, "agent_dim", None), int)


class Agents:
    """The agents of the multi-agent networks in a model."""

    def __init__(self, modules: Iterable[nn.Module], batch: tuple[int, ...]) -> None:
        nets = [net for net in modules if _has_agents(net)]
        self._inside = {part: int(net.n_agents) for net in nets for part in net.modules()}  # type: ignore[arg-type]
        self._counts = set(self._inside.values())
        self._batch = batch

    def places(self, module: nn.Module, items: Items, value: Tensor) -> list[Items]:
        """Return the way to each agent in a value that a module gives out; where it has none, the one to the value."""
        if not self._counts:
            return [items]
        members = Members.of(value, self._batch)
        shape = value.shape if members is None else members.seen(members.raw).shape
        axis = len(self._batch) if tuple(shape[: len(self._batch)]) == self._batch else 0
        inside = self._inside.get(module)
        counts = self._counts if inside is None else {inside}
        # beside the multi-agent network itself, a value of more dimensions may be an image
        fits = len(shape) == axis + 2 or (inside is not None and len(shape) > axis + 2)
        return [(*items, f"agent {i}") for i in range(shape[axis])] if fits and shape[axis] in counts else [items]
