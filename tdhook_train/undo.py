"""One stack for every change to somebody else's model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch.utils.hooks import RemovableHandle

__all__ = ["Undo"]

_ABSENT = object()


class Undo(ExitStack):
    """A stack of ways back, run last first, all of them, whatever one of them raises.

    Build it in a ``with`` block and publish it when complete (``self._undo = undo.pop_all()``), so that a failure
    half-way through undoes the half that was done.
    """

    def hook(self, handle: RemovableHandle) -> None:
        """Remove ``handle`` on the way back."""
        self.callback(handle.remove)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute now and put the old one back (or delete it, where there was none) on the way out."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        if before is _ABSENT:
            self.callback(delattr, owner, name)
        else:
            self.callback(setattr, owner, name, before)
