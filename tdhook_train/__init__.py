"""Interpretability while a network trains."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tdhook_train.edit import Edit, Rewrite
from tdhook_train.hooks import HookedModel
from tdhook_train.method import Method, Seen
from tdhook_train.schedule import At, Budget, Every, Geometric, When

if TYPE_CHECKING:
    from tdhook_train.buffer import ArtifactBuffer
    from tdhook_train.checkpoints import sweep
    from tdhook_train.observer import LiveEdit, Observer, ProbeSet

__version__ = "0.1.0"

__all__ = [
    "ArtifactBuffer",
    "At",
    "Budget",
    "Edit",
    "Every",
    "Geometric",
    "HookedModel",
    "LiveEdit",
    "Method",
    "Observer",
    "ProbeSet",
    "Rewrite",
    "Seen",
    "When",
    "sweep",
]

# these bring torchrl along, which takes seconds to import: loaded on first use
_LATER = {
    "ArtifactBuffer": "tdhook_train.buffer",
    "LiveEdit": "tdhook_train.observer",
    "Observer": "tdhook_train.observer",
    "ProbeSet": "tdhook_train.observer",
    "sweep": "tdhook_train.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'tdhook_train' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
