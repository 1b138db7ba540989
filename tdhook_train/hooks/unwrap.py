"""The model inside what a training puts around it, or an error where hooks cannot reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

from tdhook_train.errors import NetworkError
from tdhook_train.keys import path_of

__all__ = ["inputs_of", "unwrapped"]

Call = Callable[..., Any]


def unwrapped(model: nn.Module) -> tuple[nn.Module, Call]:
    """Return the model whose paths count, and how it is called.

    torch.compile, DataParallel and DistributedDataParallel are left out of the pass: an eager forward of one process
    needs neither their code nor their communication. Fabric's precision is kept.

    Raises:
        NetworkError: the model is scripted, sharded, a TorchRL loss or no module at all.
    """
    if not isinstance(model, nn.Module):
        raise NetworkError(f"expected a torch module, got {type(model).__name__}")
    inner, fabric = model, None
    while (step := _inside(inner)) is not None:
        fabric = inner if _is(inner, "_FabricModule") else fabric
        inner = step
    _refuse(inner)
    return inner, inner if fabric is None else _in_precision_of(fabric, inner)


def _inside(model: nn.Module) -> nn.Module | None:
    if "_orig_mod" in model._modules:
        return model._modules["_orig_mod"]
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    return model._modules.get("_original_module") if _is(model, "_FabricModule") else None


def _is(model: nn.Module, *names: str) -> bool:  # by name: neither Lightning nor FSDP is imported to ask
    return any(kind.__name__ in names for kind in type(model).__mro__)


def _in_precision_of(fabric: Any, model: nn.Module) -> Call:
    precision = fabric._strategy.precision

    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(precision.convert_input(arg) if isinstance(arg, Tensor) else arg for arg in args)
        with precision.forward_context():
            output = model(*args, **kwargs)
        return precision.convert_output(output) if isinstance(output, Tensor) else output

    return call


def _refuse(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise NetworkError("the model is scripted (TorchScript): hooks do not fire inside; use what it was made from")
    for path, part in model.named_modules():
        where = f"{type(model).__name__}{f' at {path!r}' if path else ''}"
        if _is(part, "FullyShardedDataParallel", "FSDPModule"):
            raise NetworkError(
                f"{where} is sharded (FSDP), and no process holds its weights; use an unsharded copy with "
                "the full state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict)"
            )
    if hasattr(model, "convert_to_functional"):
        raise NetworkError(
            f"{type(model).__name__} is a TorchRL loss, which keeps its networks and their weights apart; observe it "
            "with tdhook_train.rl.ObservedLoss, or hook a copy of one network: "
            "Shadow(networks(loss)['actor_network']).module, both from tdhook_train.isolation"
        )


def inputs_of(module: TensorDictModuleBase) -> list[NestedKey]:
    """Return what a module reads; not ``"params"``, below which an earlier part of it writes."""
    parts = getattr(module, "module", None) if isinstance(module, TensorDictSequential) else None
    if parts is None or not all(hasattr(part, "in_keys") for part in parts):
        return list(module.in_keys)
    read: list[NestedKey] = []
    made: list[tuple[str, ...]] = []
    for part in parts:
        read += [k for k in inputs_of(part) if not any(one[: len(path_of(k))] == path_of(k) for one in made)]
        made += [path_of(key) for key in part.out_keys]
    return [key for key in module.in_keys if key in read]
