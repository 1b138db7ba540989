"""When to measure. Triggers fire on *crossing* a boundary, since clocks may advance by more than one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, cast

from torch import Tensor

from tdhook_train.errors import KeyMissingError, SettingsError, did_you_mean
from tdhook_train.schedule.clock import Clock, Times

__all__ = ["At", "Every", "Geometric", "Trigger", "When"]

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


@dataclass(frozen=True, kw_only=True)
class Every(Trigger):
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

    @property
    def scales(self) -> frozenset[str]:
        """The scale that is counted."""
        return frozenset([self.scale])

    @property
    def everywhere(self) -> bool:
        """Whether it counts anything but seconds."""
        return "seconds" not in self.scales

    def due(self, clock: Clock) -> bool:
        """Whether a multiple of the period was crossed."""
        # 1e-9 of a period: a fraction of a total is rarely exact in floating point
        last = max(_reading(clock.before, self.scale), 0)
        return math.floor(_reading(clock, self.scale) / self.period + 1e-9) > math.floor(last / self.period + 1e-9)


@dataclass(frozen=True)
class At(Trigger):
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
    def scales(self) -> frozenset[str]:
        """The scale of the steps."""
        return frozenset([self.of])

    @property
    def everywhere(self) -> bool:
        """Whether it counts anything but seconds."""
        return "seconds" not in self.scales

    def due(self, clock: Clock) -> bool:
        """Whether one of the steps was crossed."""
        return _crossed(self.steps, self.of, clock)


@dataclass(frozen=True, kw_only=True)
class Geometric(Trigger):
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
    def scales(self) -> frozenset[str]:
        """The scale of the steps."""
        return frozenset([self.of])

    @property
    def everywhere(self) -> bool:
        """Whether it counts anything but seconds."""
        return "seconds" not in self.scales

    def due(self, clock: Clock) -> bool:
        """Whether one of the steps was crossed."""
        return _crossed(self.steps, self.of, clock)


@dataclass(frozen=True)
class When(Trigger):
    """Due when a function of the clock says so, or when a value that was measured goes beyond a bound.

    ``When("health", "dormant", above=0.3)`` is due at each crossing: where a row's values are beyond the bound and
    those of the row before were not, and so once until they have come back. With ``fires="while"`` it is due all the
    time that the last row is beyond, which is meant to be joined with a cadence:
    ``Every(optim_steps=1000) & When("health", "dormant", above=0.3, fires="while")``. NaNs are left out; a row of
    nothing else says nothing.

    Args:
        fn: a function of the clock, or the name of a row.
        key: of the row's artifact.
        above: the upper bound, or
        below: the lower one.
        over: whether one of the artifact's values has to be beyond it (``"any"``), each (``"all"``), or their mean.
        fires: at each ``"crossing"`` of the bound, or all the ``"while"`` that it is crossed.
    """

    fn: Callable[[Clock], bool] | str
    key: str | tuple[str, ...] | None = None
    _: KW_ONLY
    above: float | None = None
    below: float | None = None
    over: Literal["any", "all", "mean"] = "any"
    fires: Literal["crossing", "while"] = "crossing"

    def __post_init__(self) -> None:
        if callable(self.fn):
            if (self.key, self.above, self.below) != (None, None, None):
                raise SettingsError("When(fn) takes a function of the clock alone")
        elif self.key is None or (self.above is None) == (self.below is None):
            wanted = 'a row, its key and one bound: When("health", "dormant", above=0.3)'
            raise SettingsError(f"When needs a function of the clock, or {wanted}")
        elif self.over not in ("any", "all", "mean"):
            raise SettingsError(f"over={self.over!r}{did_you_mean(self.over, ('any', 'all', 'mean'))}")
        elif self.fires not in ("crossing", "while"):
            raise SettingsError(f"fires={self.fires!r}{did_you_mean(self.fires, ('crossing', 'while'))}")

    @property
    def rows(self) -> frozenset[str]:
        """The row it goes by."""
        return frozenset([self.fn]) if isinstance(self.fn, str) else frozenset()

    def due(self, clock: Clock) -> bool:
        """Ask the function, or compare each row that is new with the one before it that said something.

        Raises:
            KeyMissingError: the row has no such key; names the nearest.
        """
        if not isinstance(self.fn, str):
            return bool(self.fn(clock))
        if self.fires == "crossing" and self.fn not in clock.fresh:
            return False
        every = [self._beyond(row) for row in (clock.known.get(self.fn), *clock.fresh.get(self.fn, ()))]
        beyond = [False, *(one for one in every if one is not None)]
        if self.fires == "while":
            return beyond[-1]
        return any(now and not before for before, now in pairwise(beyond if every[0] is None else beyond[1:]))

    def _beyond(self, row: Mapping[Any, Tensor] | None) -> bool | None:
        """Whether a row is beyond the bound; None where it says nothing."""
        if row is None:
            return None
        key = tuple(self.key.split(".")) if isinstance(self.key, str) and self.key not in row else self.key
        if key not in row:
            known = [".".join(key) if isinstance(key, tuple) else key for key in row]
            raise KeyMissingError(f"rows {self.fn!r} hold no {self.key!r}{did_you_mean(str(self.key), known)}")
        values = row[key]
        values = values if values.is_floating_point() else values.double()
        values = values[~values.isnan()]
        if not len(values):
            return None
        values = values.mean().reshape(1) if self.over == "mean" else values
        beyond = values > self.above if self.above is not None else values < cast(float, self.below)
        return bool(beyond.all() if self.over == "all" else beyond.any())


def _crossed(steps: tuple[int, ...], scale: str, clock: Clock) -> bool:
    before, now = _reading(clock.before, scale), _reading(clock, scale)
    return any(before < step <= now for step in steps)


def _check_scale(scale: str) -> None:
    if scale not in _FIELD:
        raise SettingsError(f"of={scale!r} is no scale of a training{did_you_mean(scale, _FIELD)}")
