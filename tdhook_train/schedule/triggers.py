"""When to measure. Triggers fire on *crossing* a boundary, since clocks may advance by more than one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tdhook_train.errors import SettingsError, did_you_mean
from tdhook_train.schedule.clock import Clock, Times

__all__ = ["At", "Every", "Geometric", "Trigger"]

Scale = Literal["optim_steps", "batches", "epochs", "frames", "seconds"]
_FIELD = {"optim_steps": "step", "batches": "batches", "epochs": "epoch", "frames": "frames", "seconds": "seconds"}


def _reading(times: Times | Clock | None, scale: str) -> float:
    return -1 if times is None else getattr(times, _FIELD[scale])


class Trigger(ABC):
    """Something that is due or not at a moment; joined by ``|`` and ``&``."""

    @abstractmethod
    def due(self, clock: Clock) -> bool:
        """Whether a boundary lies after ``clock.before`` and not after now."""

    @property
    def rows(self) -> frozenset[str]:
        """The rows whose values it goes by."""
        return frozenset()

    @property
    def scales(self) -> frozenset[str]:
        """The scales of the clock that it goes by."""
        return frozenset()

    @property
    def everywhere(self) -> bool:
        """Whether every process of a training that asks it finds the same.

        Not so unless a trigger says so: clocks on the wall differ, and rows are known where they are measured.
        """
        return False

    def __or__(self, other: Trigger) -> Trigger:
        """Due when either is."""
        return _Any(self, other)

    def __and__(self, other: Trigger) -> Trigger:
        """Due when both are."""
        return _All(self, other)


@dataclass(frozen=True)
class _Both(Trigger):
    left: Trigger
    right: Trigger

    @property
    def rows(self) -> frozenset[str]:
        return self.left.rows | self.right.rows

    @property
    def scales(self) -> frozenset[str]:
        return self.left.scales | self.right.scales

    @property
    def everywhere(self) -> bool:
        return self.left.everywhere and self.right.everywhere


@dataclass(frozen=True)
class _Any(_Both):
    def due(self, clock: Clock) -> bool:
        return self.left.due(clock) or self.right.due(clock)


@dataclass(frozen=True)
class _All(_Both):
    def due(self, clock: Clock) -> bool:
        return self.left.due(clock) and self.right.due(clock)


class _Counting(Trigger):
    """A trigger that goes by one scale of the clock."""

    @property
    @abstractmethod
    def scale(self) -> str:
        """The scale."""

    @property
    def scales(self) -> frozenset[str]:
        """The scale that is counted."""
        return frozenset([self.scale])

    @property
    def everywhere(self) -> bool:
        """Whether it counts anything but seconds."""
        return self.scale != "seconds"


@dataclass(frozen=True, kw_only=True)
class Every(_Counting):
    """Due at n, 2n, … of one scale, never at 0.

    Args:
        optim_steps: optimizer steps, or
        batches: batches seen, or
        epochs: epochs, or
        frames: environment frames, or
        seconds: wall time; not the same steps after a resume.
        fraction: instead of a number, a share of ``total_frames`` or ``total_steps``.
        total_frames: the length of the training in frames.
        total_steps: the length of the training in optimizer steps.
    """

    optim_steps: int | None = None
    batches: int | None = None
    epochs: int | None = None
    frames: int | None = None
    seconds: float | None = None
    fraction: float | None = None
    total_frames: int | None = None
    total_steps: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in _FIELD if getattr(self, name) is not None]
        totals = [name for name in ("total_frames", "total_steps") if getattr(self, name) is not None]
        if len(given) + (self.fraction is not None) != 1:
            raise SettingsError(f"Every takes exactly one of {', '.join(_FIELD)} or fraction, got {given or 'none'}")
        if len(totals) != (self.fraction is not None):
            raise SettingsError("Every(fraction=...) needs one of total_frames=... and total_steps=..., and only it")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise SettingsError(f"Every(fraction=...) is a share of the training in (0, 1], got {self.fraction}")
        if not self.period > 0:
            raise SettingsError(f"Every needs a positive period, got {self.period}")

    @cached_property
    def scale(self) -> str:
        """The scale that is counted."""
        if self.fraction is not None:
            return "frames" if self.total_frames is not None else "optim_steps"
        return next(name for name in _FIELD if getattr(self, name) is not None)

    @cached_property
    def period(self) -> float:
        """The distance between boundaries, on that scale."""
        if self.fraction is not None:
            return self.fraction * float(self.total_frames or self.total_steps or 0)
        return float(getattr(self, self.scale))

    def due(self, clock: Clock) -> bool:
        """Whether a multiple of the period was crossed."""
        # 1e-9 of a period: a fraction of a total is rarely exact in floating point
        last = max(_reading(clock.before, self.scale), 0)
        return math.floor(_reading(clock, self.scale) / self.period + 1e-9) > math.floor(last / self.period + 1e-9)


@dataclass(frozen=True)
class At(_Counting):
    """Due at the given steps; 0 is the moment before the first update."""

    steps: tuple[int, ...]
    of: Scale = "optim_steps"

    def __init__(self, *steps: int, of: Scale = "optim_steps") -> None:
        if not steps or any(step < 0 for step in steps):
            raise SettingsError(f"At needs steps of 0 or more, got {steps}")
        _check_scale(of)
        object.__setattr__(self, "steps", tuple(sorted(steps)))
        object.__setattr__(self, "of", of)

    @property
    def scale(self) -> str:
        """The scale of the steps."""
        return self.of

    def due(self, clock: Clock) -> bool:
        """Whether one of the steps was crossed."""
        return _crossed(self.steps, self.of, clock)


@dataclass(frozen=True, kw_only=True)
class Geometric(_Counting):
    """Due at up to ``n`` steps spaced evenly in log-step, from ``first`` to ``last``; whole steps, each once."""

    first: int = 1
    last: int
    n: int = 64
    of: Scale = "optim_steps"

    def __post_init__(self) -> None:
        _check_scale(self.of)
        if not 0 < self.first <= self.last or self.n < 1:
            raise SettingsError(
                f"Geometric needs 0 < first <= last and n >= 1, got {self.first}, {self.last}, {self.n}"
            )

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps at which it is due."""
        if self.n == 1:
            return (self.first,)
        ratio = self.last / self.first
        return tuple(sorted({round(self.first * ratio ** (i / (self.n - 1))) for i in range(self.n)}))

    @property
    def scale(self) -> str:
        """The scale of the steps."""
        return self.of

    def due(self, clock: Clock) -> bool:
        """Whether one of the steps was crossed."""
        return _crossed(self.steps, self.of, clock)


def _crossed(steps: tuple[int, ...], scale: str, clock: Clock) -> bool:
    before, now = _reading(clock.before, scale), _reading(clock, scale)
    return any(before < step <= now for step in steps)


def _check_scale(scale: str) -> None:
    if scale not in _FIELD:
        raise SettingsError(f"of={scale!r} is no scale of a training{did_you_mean(scale, _FIELD)}")
