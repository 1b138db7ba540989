"""A guard around a live module: measured in place, found as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["in_place", "keep_rng"]


@contextmanager
def keep_rng(modules: Iterable[nn.Module], seed: int) -> Iterator[None]:
    """Seed the random states of the CPU and of every device in use, and put the old ones back."""
    devices = {p.device for module in modules for p in module.parameters() if p.device.type != "cpu"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        torch.manual_seed(seed)
        yield


@contextmanager
def in_place(model: nn.Module, seed: int) -> Iterator[None]:
    """Hold a live module still while it is measured.

    Training flags are saved and restored per module, not by ``.train()``, which would wake a frozen BatchNorm.
    Buffers, gradients and random states return to what they were, on every way out.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    grads: list[tuple[Tensor, Tensor | None]] = [(p, p.grad) for p in model.parameters()]
    with torch.inference_mode(False), keep_rng([model], seed):
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
            for parameter, grad in grads:
                parameter.grad = grad
