"""How a pass runs: without the compiled graphs and fused kernels that hooks do not reach, and without a trace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from tdhook_train.hooks.reroute import Detour
from tdhook_train.undo import Undo, devices_of, kept_buffers, kept_rng

__all__ = ["layer_by_layer", "unfused", "untouched"]


def _eager(modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """Run without compiled code, in which hooks never fire; what was compiled stays, and is not compiled again."""
    compiled = any(
        part._compiled_call_impl is not None
        or "_orig_mod" in part._modules
        or not isinstance(part.__dict__.get("forward"), Detour | None)
        for part in modules
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def layer_by_layer(*, attends: bool, recurs: bool) -> Iterator[None]:
    """Leave out the fused kernels that do not take hooks or gradients.

    torch's attention layers have a fast path for evaluation that passes their inner modules by, and gives padded
    positions other values; cuDNN's recurrent layers refuse a backward pass in evaluation mode.
    """
    fast = attends and torch.backends.mha.get_fastpath_enabled()
    with torch.backends.cudnn.flags(enabled=False) if recurs and torch.is_grad_enabled() else nullcontext():
        try:
            if fast:
                torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            if fast:
                torch.backends.mha.set_fastpath_enabled(True)


class _Shared:
    """A change of the whole process for blocks that end in any order: the first makes it, the last takes it back."""

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self._change = change
        self._lock = threading.RLock()  # a block that is forgotten may end while garbage is collected, inside another
        self._holders = 0
        self._undo = ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the change."""
        with self._lock:
            if not self._holders:
                self._undo.enter_context(self._change())
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._undo.close()


_eager_everywhere = _Shared(partial(torch.compiler.set_stance, "force_eager"))
_attends_everywhere = _Shared(partial(layer_by_layer, attends=True, recurs=False))


@contextmanager
def unfused(*, attends: bool) -> Iterator[None]:
    """Run everything eagerly and, if ``attends``, without fused attention, until the last of several blocks ends."""
    with _eager_everywhere.held(), _attends_everywhere.held() if attends else nullcontext():
        yield


@contextmanager
def untouched(parts: list[nn.Module], *, graph: bool) -> Iterator[Undo]:
    """Run eagerly, with or without a graph, and find hooks, buffers and random states as before."""
    inference = torch.is_inference_mode_enabled() and not graph
    with Undo() as undo, torch.inference_mode(inference), torch.set_grad_enabled(graph):
        undo.enter_context(kept_rng(devices_of(parts)))
        undo.enter_context(kept_buffers(parts))
        undo.enter_context(_eager(parts))
        yield undo
