"""By which of its modes a policy acts while it is measured, said to the measuring thread alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensordict.nn import InteractionType, probabilistic

__all__ = ["deterministic"]


class _ByThread:
    """Stands in for tensordict's one mode of the whole process: threads that measure have one of their own."""

    def __init__(self, everybodys: Any) -> None:
        self.everybodys = everybodys
        self._own = threading.local()

    @property
    def own(self) -> list[Any]:
        """The modes that the calling thread has entered, the present one last; none where it does not measure."""
        if not hasattr(self._own, "modes"):
            self._own.modes = []
        return self._own.modes

    def get_mode(self) -> Any:
        """Return the mode in which the calling thread's policies act."""
        return self.own[-1] if self.own else self.everybodys.get_mode()

    def set_mode(self, mode: Any) -> None:
        """Set it, for the calling thread where it measures, else for everybody."""
        if self.own:
            self.own[-1] = mode
        else:
            self.everybodys.set_mode(mode)


_lock = threading.Lock()
_measuring = 0  # blocks that are open, in whatever thread


@contextmanager
def deterministic() -> Iterator[None]:
    """Let policies act by their mode in this thread.

    tensordict's ``set_interaction_type`` holds for the process: a collector in another thread would act by its mode
    as well meanwhile, and what it says of its own policy would hold here and, put back in another order, for good.
    """
    global _measuring
    with _lock:
        if not _measuring:
            probabilistic._interaction_type = _ByThread(probabilistic._interaction_type)
        _measuring += 1
        modes = probabilistic._interaction_type
    modes.own.append(InteractionType.DETERMINISTIC)
    try:
        yield
    finally:
        modes.own.pop()
        with _lock:
            _measuring -= 1
            if not _measuring:
                probabilistic._interaction_type = modes.everybodys
