"""A guard around a live module: measured in place, found as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

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
        # not torch.manual_seed, which seeds every GPU of the machine, also those whose state is not kept here
        torch.default_generator.manual_seed(seed)
        for device in devices:
            backend = torch.get_device_module(device)
            with getattr(backend, "device", nullcontext)(device):
                backend.manual_seed(seed)
        yield


@contextmanager
def in_place(model: nn.Module, seed: int) -> Iterator[None]:
    """Hold a live module still while it is measured.

    Training flags are saved and restored per module, not by ``.train()``, which would wake a frozen BatchNorm.
    Buffers, gradients and random states return to what they were, on every way out.
    """
    flags = [(module, module.training) for module in model.modules()]
    grads: list[tuple[Tensor, Tensor | None]] = [(p, p.grad) for p in model.parameters()]
    with torch.inference_mode(False), keep_rng([model], seed):
        buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module, _ in flags
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        try:
            for module, _ in flags:
                module.training = False
            for parameter, _ in grads:
                parameter.grad = None  # out of reach: a backward pass would add to it in place
            yield
        finally:
            for module, training in flags:
                module.training = training
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer  # a module may put another tensor there
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
            for parameter, grad in grads:
                parameter.grad = grad
