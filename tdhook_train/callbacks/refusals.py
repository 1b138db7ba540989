"""What a callback refuses when it is made, and what it takes back where its first measurement fails."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from tdhook_train.buffer.retention import Retention
from tdhook_train.errors import SettingsError, did_you_mean
from tdhook_train.observer import Observer
from tdhook_train.undo import Undo

__all__ = ["refuse_settings", "refuse_words", "remove_if_new"]

_WORDS = {
    "at": ("training", "validation", "end"),
    "weights": ("live", "average"),
    "on_error": ("raise", "warn", "skip"),
}
_LIMITS = ("capacity", "max_bytes", "keep")
_OWN = ("self", "methods", "when", "into", "on", "loggers")  # of an observer, which a callback sets itself


def refuse_words(**given: str) -> None:
    """Refuse a word that a setting does not know.

    Raises:
        MisconfigurationException: with the nearest one.
    """
    for setting, value in given.items():
        if value not in _WORDS[setting]:
            raise MisconfigurationException(f"{setting}={value!r}{did_you_mean(str(value), _WORDS[setting])}")


def refuse_settings(kind: type, given: Mapping[str, Any], limits: Mapping[str, Any]) -> None:
    """Refuse settings that neither a callback nor its observer has.

    Raises:
        SettingsError: with the nearest one.
    """
    known = [name for name in inspect.signature(Observer).parameters if name not in _OWN]
    for name in given:
        if name not in known:
            own = {name for part in kind.__mro__ for name in inspect.signature(part).parameters} - {
                *_OWN[:2],
                "settings",
            }
            near = did_you_mean(name, sorted({*known, *own} - {"args", "kwargs", "options"}))
            raise SettingsError(f"{kind.__name__} has no setting {name!r}{near}")
    for name in limits:
        if name not in _LIMITS:
            raise SettingsError(f"limits={dict(limits)!r}: no limit is called {name!r}{did_you_mean(name, _LIMITS)}")
    Retention().changed(*(limits.get(name) for name in _LIMITS))


def remove_if_new(path: Path, undo: Undo) -> None:
    """Let a folder that is not there yet, and those around it, be removed where what follows fails."""
    missing = [one for one in (path, *path.parents) if not one.exists()]

    def remove() -> None:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # others have put something there since
            for one in missing[1:]:
                one.rmdir()

    if missing:
        undo.callback(remove)
