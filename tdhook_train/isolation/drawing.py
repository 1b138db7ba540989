"""Whether a network draws random numbers, and whether there are other threads that may."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["accompanied", "draws", "undrawn"]

# of tqdm, multiprocessing, tensorboard and wandb: by class or by name
_HARMLESS = {
    "TMonitor", "QueueFeederThread", "_AsyncWriterThread", "NetStatThr", "ChkStopThr", "IntMsgThr", "MsgRouterThr",
}  # fmt: skip


class _Drew(BaseException):
    """Nothing that a network catches."""


class _Refuse(TorchDispatchMode):
    """Stops at the first operation of this thread that would draw from the process's generator, before it has drawn."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and (kwargs or {}).get("generator") is None:
            raise _Drew
        return func(*args, **(kwargs or {}))


def draws(call: Callable[[], Any]) -> bool:
    """Whether a call would draw random numbers; nothing is drawn to find out.

    A call that fails is none that draws: whoever makes it in earnest is told why it fails.
    """
    try:
        with torch.no_grad(), _Refuse():
            call()
    except _Drew:
        return True
    except Exception:  # whatever the user's network raises
        return False
    return False


@contextmanager
def undrawn(refusal: Exception) -> Iterator[None]:
    """Raise ``refusal`` where this thread draws from the process's generators.

    Of torch's before it has drawn; of Python's and NumPy's at the end, where another thread's draws look the same.
    """
    python, numpy = random.getstate(), _of_numpy()
    try:
        with _Refuse():
            yield
    except _Drew:
        raise refusal from None
    if python != random.getstate() or numpy != _of_numpy():
        raise refusal


def _of_numpy() -> tuple[Any, ...]:
    kind, words, *rest = np.random.get_state()
    return (kind, np.asarray(words).tobytes(), *rest)


def accompanied() -> bool:
    """Whether other threads run that may draw from the process's generators."""
    me = threading.current_thread()
    return any(thread is not me and not _harmless(thread) for thread in threading.enumerate())


def _harmless(thread: threading.Thread) -> bool:
    known = type(thread).__name__ in _HARMLESS or thread.name in _HARMLESS
    return known or isinstance(thread, threading.Timer)  # the buffer's own
