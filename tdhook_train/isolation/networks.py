"""The named networks of a loss or module, with the weights that are actually trained.

A TorchRL loss keeps its networks out of ``named_modules()`` and their parameters beside them: ``actor_network`` with
``actor_network_params``, ``qvalue_network`` with parameters that carry a member dimension, and targets under
``target_*_params``. The module a user built may hold other weights than those (see :func:`networks`). Losses that are
not functional, and those of world models, hold their networks as plain attributes; some hold other losses. All are
found by these names alone, so that TorchRL need not be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import nn

from tdhook_train.errors import NetworkError

__all__ = ["Network", "is_loss", "networks"]


@dataclass(frozen=True)
class Network:
    """One callable network: its module (structure only) and a way to its live weights."""

    name: str
    module: nn.Module
    weights: Callable[[], TensorDictBase]  # not copied, outside any graph
    in_keys: tuple[NestedKey, ...] | None = None  # what it reads, where the module does not say


def is_loss(model: nn.Module) -> bool:
    """Whether ``model`` keeps its networks as TorchRL's losses do."""
    return hasattr(model, "convert_to_functional")


def networks(model: nn.Module) -> dict[str, Network]:
    """Return every network of ``model`` by name; a model that is no loss is one network with the empty name.

    Members of an ensemble are ``qvalue_network.0``, ``.1``, …; targets with weights of their own are named as the loss
    names their parameters, ``target_qvalue_network.0``. Networks of a loss inside a loss begin with its name.

    Raises:
        NetworkError: a loss in which no network was found.
    """
    if not is_loss(model):
        return {"": Network("", model, partial(_own_weights, model))}
    found = _of_parts(model) | _functional(model)
    if not found:
        found = {
            name: Network(name, module, partial(_own_weights, module), _inputs(model, module))
            for name, module in _plain(model).items()
        }
    if not found:
        raise NetworkError(
            f"{type(model).__name__} holds no network to observe; observe the module it trains instead: "
            "observer.step(module, batch, step=...)"
        )
    return found


def _of_parts(loss: nn.Module) -> dict[str, Network]:
    parts = {n: part for n, part in loss._modules.items() if part is not None and is_loss(part) and n[0] != "_"}
    return {
        f"{part}.{name}": replace(network, name=f"{part}.{name}")
        for part, inner in parts.items()
        for name, network in networks(inner).items()
    }


def _functional(loss: nn.Module) -> dict[str, Network]:
    found: dict[str, Network] = {}
    for name, module in _candidates(loss).items():
        if getattr(loss, f"{name}_params", None) is None:
            found[name] = Network(name, module, partial(_own_weights, module))
            continue
        found |= _members(loss, module, name, f"{name}_params")
        if f"target_{name}_params" in loss._modules:
            found |= _members(loss, module, f"target_{name}", f"target_{name}_params")
    return found


def _candidates(loss: nn.Module) -> dict[str, nn.Module]:
    functional = {k: v for k, v in vars(loss).items() if isinstance(v, nn.Module)}
    registered = {k: v for k, v in loss._modules.items() if v is not None}
    return {k: v for k, v in (functional | registered).items() if hasattr(loss, f"{k}_params")}


def _plain(loss: nn.Module) -> dict[str, nn.Module]:
    """The modules that a loss holds under a public name: with weights, no environment, not part of one another."""
    held = {k: v for k, v in (vars(loss) | loss._modules).items() if isinstance(v, nn.Module) and k[0] != "_"}
    held = {k: v for k, v in held.items() if not hasattr(v, "rollout") and next(v.parameters(), None) is not None}
    inside = {id(part) for module in held.values() for part in module.modules() if part is not module}
    return {k: v for k, v in held.items() if id(v) not in inside}


def _inputs(loss: nn.Module, module: nn.Module) -> tuple[NestedKey, ...] | None:
    if hasattr(module, "in_keys"):
        return None
    observation = getattr(getattr(loss, "tensor_keys", None), "observation", None)
    return None if observation is None else (observation,)


def _members(loss: nn.Module, module: nn.Module, name: str, params: str) -> dict[str, Network]:
    shape = _weights_of(loss, params, None).batch_size
    if not shape:
        return {name: Network(name, module, partial(_weights_of, loss, params, None))}
    return {
        f"{name}.{i}": Network(f"{name}.{i}", module, partial(_weights_of, loss, params, i)) for i in range(shape[0])
    }


def _own_weights(module: nn.Module) -> TensorDictBase:
    return TensorDict.from_module(module).data


def _weights_of(loss: nn.Module, params: str, member: int | None) -> TensorDictBase:
    # not by getattr, which warns about targets without an updater
    weights = cast(TensorDictBase, loss._modules[params]).data
    return weights if member is None else weights[member]
