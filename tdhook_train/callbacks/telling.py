"""What a fit is told of its measurements: loggers, the metrics that other callbacks monitor, the progress bar."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

__all__ = ["NO_NAME", "Telling", "Told", "keyed", "refuse_clashes"]

Told = tuple[Mapping[str, float], int]  # scalars, and the step they were measured at

NO_NAME = "observer"  # the name of a callback that was given none

_LONGEST = 250  # characters that MLflow takes; more of them end the fit


class Telling:
    """Tells all that a fit has, as a logger of its observer.

    Args:
        trainer: of the fit.
        name: of the callback.
        log_metrics: tell loggers, and callbacks that monitor a metric.
        prog_bar: show one value in the progress bar.
    """

    def __init__(self, trainer: Trainer, name: str, *, log_metrics: bool, prog_bar: bool) -> None:
        bar = trainer.progress_bar_callback
        self._trainer, self._name = trainer, name
        self._monitored = log_metrics
        self._bar = _Bar(trainer, name) if prog_bar and bar is not None and getattr(bar, "is_enabled", True) else None
        self._loggers = [_Logger(logger) for logger in trainer.loggers] if log_metrics else []
        self.keeps = False  # what it was told, since others are to be told as well
        self._told: list[Told] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Tell of scalars that were measured at a step."""
        if self.keeps:
            self._told.append((dict(metrics), step))
        told = {keyed(self._name, key): value for key, value in metrics.items()}
        if self._monitored:
            self._trainer.callback_metrics.update({key: torch.tensor(value) for key, value in told.items()})
        if self._bar is not None:
            self._bar.show(told, step)
        for logger in self._loggers:
            logger.log_metrics(told, step)

    def taken(self) -> list[Told]:
        """Return what was told since this was last asked."""
        told, self._told = self._told, []
        return told

    def close(self) -> None:
        """Leave the progress bar's metrics as they were."""
        if self._bar is not None:
            self._bar.close()


def keyed(name: str, key: str) -> str:
    """Let a key begin with the name of a callback that has one: two of them may have rows of one name."""
    return key if name == NO_NAME or key.startswith((f"{name}/", f"{name}.")) else f"{name}/{key}"


def refuse_clashes(rows: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Refuse callbacks whose values would overwrite each other's.

    Args:
        rows: the names of callbacks and of their rows.

    Raises:
        MisconfigurationException: two would log the same keys.
    """
    taken: dict[str, str] = {}
    for name, own in rows:
        for head in (keyed(name, f"{row}/") for row in own):
            if head in taken:
                both = f"the callbacks {taken[head]!r} and {name!r} would both log {head + '...'!r}"
                raise MisconfigurationException(f"{both}; give one of them another name=")
            taken[head] = name


class _Bar:
    """One entry, ``probe: r2/action 0.93 (step 40)``, which goes when the fit ends."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        self._trainer, self._name = trainer, name
        self._shown_in: dict[str, Any] = {}
        self._key = ""

    def show(self, metrics: Mapping[str, float], step: int) -> None:
        self._key = self._key or next(iter(metrics))  # always the same one
        if self._key in metrics:
            self._shown_in = cast(dict[str, Any], self._trainer.progress_bar_metrics)  # bars take texts too
            what = self._key.removeprefix(f"{self._name}/")
            self._shown_in[self._name] = f"{what} {metrics[self._key]:.3g} (step {step})"

    def close(self) -> None:
        self._shown_in.pop(self._name, None)


class _Logger:
    """A logger of Lightning, told by names that it takes."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._choosy = any(kind.__name__ == "MLFlowLogger" for kind in type(logger).__mro__)
        self._names: dict[str, str] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        told = {self._plain(key): value for key, value in metrics.items()} if self._choosy else dict(metrics)
        self._logger.log_metrics(told, step)

    def _plain(self, key: str) -> str:
        """Return a name for MLflow: Lightning drops what MLflow refuses, which may leave two names the same."""
        if key not in self._names:
            parts = (re.sub(r"[^a-zA-Z0-9_. -]", "_", part) for part in key.split("/"))
            plain = "/".join("_" if part in ("", ".", "..") else part for part in parts)[:_LONGEST]
            taken, number, free = set(self._names.values()), 2, plain
            while free in taken:
                free, number = f"{plain[: _LONGEST - 8]}_{number}", number + 1
            self._names[key] = free
        return self._names[key]
