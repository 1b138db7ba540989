"""A guard around a live module: measured in place, found as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tdhook_train.undo import devices_of, kept_buffers, kept_rng, leave_rng, parts_of

__all__ = ["in_place", "seeded"]


@contextmanager
def seeded(modules: Iterable[nn.Module], seed: int | None) -> Iterator[None]:
    """Seed the random states of the CPU and of every device in use, and put the old ones back.

    With None, leave them alone: they are the process's, and other threads may draw meanwhile.
    """
    if seed is None:
        with leave_rng():
            yield
        return
    with kept_rng(devices_of(part for module in modules for part in parts_of(module)), seed):
        yield


@contextmanager
def in_place(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Hold a live module still while it is measured.

    Training flags are saved and restored per module, not by ``.train()``, which would wake a frozen BatchNorm.
    Buffers, gradients, ``requires_grad`` and random states return to what they were, on every way out; the last are
    left alone where ``seed`` is None.
    """
    parts = parts_of(model)
    flags = [(module, module.training) for module in parts]
    kept: list[tuple[Tensor, Tensor | None, bool]] = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    with torch.inference_mode(False), seeded([model], seed), kept_buffers(parts):
        try:
            for module in parts:
                module.training = False
            for parameter, _, _ in kept:
                parameter.grad = None  # out of reach: a backward pass would add to it in place
            yield
        finally:
            for module, training in flags:
                module.training = training
            for parameter, grad, requires_grad in kept:
                parameter.grad = grad
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
