"""A TorchRL loss that is observed and otherwise the very loss it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from tdhook_train.errors import NetworkError, SettingsError
from tdhook_train.isolation import is_loss
from tdhook_train.observer import Observer
from tdhook_train.undo import Undo

__all__ = ["ObservedLoss", "observe_loss"]


class _Hook:
    """A forward pre-hook that tells an observer where the training is.

    It counts optimizer steps by the optimizer's own hook, else by calls of the loss in training. Copies and pickles
    of the loss do not carry the observer along: they get a hook that does nothing.
    """

    def __init__(self, observer: Observer | None, *, counts_calls: bool) -> None:
        self.observer = observer
        self._counts_calls = counts_calls

    @torch.compiler.disable
    def __call__(self, loss: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.observer is None or not (loss.training and torch.is_grad_enabled()):
            return
        batch = args[0] if args else kwargs.get("tensordict")
        self.observer.step(loss, batch if isinstance(batch, TensorDictBase) else None, step=self.observer.steps_taken)
        if self._counts_calls:
            self.count()

    def count(self, *_: Any) -> None:
        """Count one step of the optimizer."""
        if self.observer is not None:
            self.observer.count_step()

    def __reduce__(self) -> tuple[Callable[..., _Hook], tuple[Any, ...]]:
        return _silent, ()


def _silent() -> _Hook:
    return _Hook(None, counts_calls=False)


class Handle:
    """Takes the observation off a loss again."""

    def __init__(self, undo: Undo) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Leave the loss (and the optimizer) as they were. Safe to call twice."""
        self._undo.close()


def observe_loss(loss: nn.Module, observer: Observer, *, optimizer: torch.optim.Optimizer | None = None) -> Handle:
    """Observe a TorchRL loss until the handle is removed or the observer is closed: see :func:`ObservedLoss`."""
    if not isinstance(loss, nn.Module) or not is_loss(loss):
        raise NetworkError(
            f"expected a TorchRL loss module, got {type(loss).__name__}; for any other module call "
            "observer.step(module, batch, step=...) in the training loop"
        )
    if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
        raise SettingsError(f"optimizer={optimizer!r} is no torch optimizer")
    if hasattr(loss, "_orig_mod"):
        raise NetworkError(
            "the loss is compiled already, which hooks on it do not reach; observe it first, compile it then: "
            "loss = torch.compile(ObservedLoss(loss, observer, optimizer))"
        )
    observer.attach(loss)
    if optimizer is not None:
        observer.optimizers.append(optimizer)
    hook = _Hook(observer, counts_calls=optimizer is None)
    observer.count_steps()
    with Undo() as undo:
        undo.hook(loss.register_forward_pre_hook(hook, with_kwargs=True))
        if optimizer is not None:
            undo.hook(optimizer.register_step_post_hook(hook.count))
        handle = Handle(undo.pop_all())
    observer.undo.callback(handle.remove)
    return handle


def ObservedLoss(loss: nn.Module, observer: Observer, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Return ``loss`` itself, observed: every call in training tells the observer where the training is.

    The same object comes back, with a forward pre-hook on it: its state_dict, parameters, keys, target updaters,
    value estimator and compilation are what they were. It measures before the loss runs, and so before the step:
    the first call measures step 0. Observe a loss before compiling it.

    Args:
        loss: any TorchRL loss whose networks can be named (:func:`tdhook_train.rl.networks`).
        observer: what to measure, when, and where to keep it.
        optimizer: counts steps by the optimizer's own hook. Without it, a step is a call of the loss in training
            mode with gradients enabled, which is wrong where gradients are accumulated over several calls.

    Raises:
        NetworkError: no TorchRL loss, one without networks, or one that is compiled already.
        PathError: a method's layers match no module.
    """
    observe_loss(loss, observer, optimizer=optimizer)
    return loss
