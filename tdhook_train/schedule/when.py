"""A trigger that goes by what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any, Literal, cast

from torch import Tensor

from tdhook_train.errors import KeyMissingError, SettingsError, did_you_mean
from tdhook_train.schedule.clock import Clock
from tdhook_train.schedule.triggers import Trigger

__all__ = ["When"]


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
