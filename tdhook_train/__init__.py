"""Interpretability while a network trains."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdhook_train.buffer import ArtifactBuffer
    from tdhook_train.checkpoints import sweep
    from tdhook_train.edit import Edit, Rewrite
    from tdhook_train.hooks import HookedModel
    from tdhook_train.method import Method, Seen
    from tdhook_train.observer import LiveEdit, Observer, ProbeSet
    from tdhook_train.schedule import At, Budget, Every, Geometric, When

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

# loaded on first use: torch takes a second to import and torchrl more, which the command line's --help can do without
_LATER = {
    "ArtifactBuffer": "tdhook_train.buffer",
    "At": "tdhook_train.schedule",
    "Budget": "tdhook_train.schedule",
    "Edit": "tdhook_train.edit",
    "Every": "tdhook_train.schedule",
    "Geometric": "tdhook_train.schedule",
    "HookedModel": "tdhook_train.hooks",
    "LiveEdit": "tdhook_train.observer",
    "Method": "tdhook_train.method",
    "Observer": "tdhook_train.observer",
    "ProbeSet": "tdhook_train.observer",
    "Rewrite": "tdhook_train.edit",
    "Seen": "tdhook_train.method",
    "When": "tdhook_train.schedule",
    "sweep": "tdhook_train.checkpoints",
}
_MODULES = ("edit", "errors", "hooks", "method", "schedule")  # at hand after `import tdhook_train`


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"tdhook_train.{name}")
    if name not in _LATER:
        raise AttributeError(f"module 'tdhook_train' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
