"""One stack for every change to somebody else's model, and what is kept while it runs."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

__all__ = ["Undo", "devices_of", "kept_buffers", "kept_randomness", "kept_rng", "leave_rng", "parts_of", "remove_all"]

_ABSENT = object()
_here = threading.local()  # .left: whether this thread leaves random states alone


class Undo(ExitStack):
    """A stack of ways back, run last first, all of them, whatever one of them raises.

    Build it in a ``with`` block and publish it when complete (``self._undo = undo.pop_all()``), so that a failure
    half-way through undoes the half that was done.
    """

    def hook(self, handle: RemovableHandle) -> None:
        """Remove ``handle`` on the way back."""
        self.callback(handle.remove)

    def hooks(self) -> list[RemovableHandle]:
        """Return a list; the hooks whose handles are put on it are removed on the way back."""
        handles: list[RemovableHandle] = []
        self.callback(remove_all, handles)
        return handles

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute now and put the old one back (or delete it, where there was none) on the way out."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        if before is _ABSENT:
            self.callback(delattr, owner, name)
        else:
            self.callback(setattr, owner, name, before)


def remove_all(handles: list[RemovableHandle]) -> None:
    """Remove hooks, and empty the list of their handles."""
    while handles:
        handles.pop().remove()


def parts_of(model: nn.Module) -> list[nn.Module]:
    """List a model's modules, each once; several times as fast as ``modules()``, which also makes their names."""
    found = {model: None}
    waiting = [model]
    while waiting:
        for part in waiting.pop()._modules.values():
            if part is not None and part not in found:
                found[part] = None
                waiting.append(part)
    return list(found)


def devices_of(modules: Iterable[nn.Module]) -> set[torch.device]:
    """Return the devices on which the modules' own parameters or buffers lie, the CPU left out."""
    found = set()
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            if tensors:
                found |= {t.device for t in tensors.values() if t is not None and not t.is_cpu and not t.is_meta}
    return found


@contextmanager
def kept_rng(devices: Iterable[torch.device], seed: int | None = None) -> Iterator[None]:
    """Put the random states of the CPU and of these devices back on the way out, but in :func:`leave_rng`.

    Args:
        devices: beside the CPU.
        seed: of all of them, meanwhile; None leaves them as they are.
    """
    if getattr(_here, "left", False):
        yield
        return
    # not fork_rng, which asks every GPU of the machine, and takes several times as long where there is none
    before = torch.default_generator.get_state()
    others = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]
    try:
        if seed is not None:
            # not torch.manual_seed, which seeds every GPU of the machine, also those whose state is not kept here
            torch.default_generator.manual_seed(seed)
            for device, _ in others:
                backend = torch.get_device_module(device)
                with getattr(backend, "device", nullcontext)(device):
                    backend.manual_seed(seed)
        yield
    finally:
        torch.default_generator.set_state(before)
        for device, state in others:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def leave_rng() -> Iterator[None]:
    """Let :func:`kept_rng` do nothing in this thread: other threads draw, and what they draw must not be taken back."""
    before, _here.left = getattr(_here, "left", False), True
    try:
        yield
    finally:
        _here.left = before


@contextmanager
def kept_randomness(seed: int | None = None) -> Iterator[None]:
    """Put every global random state back on the way out: Python's, NumPy's, torch's on the CPU and on GPUs in use.

    For whoever runs code of somebody else's that may draw from any of them, such as an environment. Not beside other
    threads, whose draws would be taken back as well.

    Args:
        seed: of all of them, meanwhile; None leaves them as they are.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with kept_rng([torch.device("cuda", index) for index in gpus], seed):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def kept_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put buffers back on the way out: the same tensors, holding the same values, and no others."""
    before = {module: dict(module._buffers) for module in modules if module._buffers}
    copies = {
        buffer: buffer.detach().clone()
        for buffers in before.values()
        for buffer in buffers.values()
        if buffer is not None and not buffer.is_meta and not is_lazy(buffer)  # which hold nothing
    }
    try:
        yield
    finally:
        for module in modules:
            if module._buffers or module in before:  # a module may have put another tensor there, or one more
                module._buffers.clear()
                module._buffers.update(before.get(module, {}))
        with ExitStack() as each:  # all of them, whatever one of them raises
            for buffer, value in copies.items():
                each.callback(_put_back, buffer, value)


def _put_back(buffer: Tensor, value: Tensor) -> None:
    if buffer.shape != value.shape:
        buffer.data = value
    elif buffer.layout is not torch.strided or not torch.equal(buffer, value):
        # by value, not by version: batch norm does not count what it writes, and a graph that waits must not notice
        with torch.no_grad(), _unsafe_preserve_version_counter(buffer):
            buffer.copy_(value)
