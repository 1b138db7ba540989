"""What is due when: rows, and what else follows from the same triggers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tdhook_train.errors import SettingsError, did_you_mean
from tdhook_train.schedule import Clock, Trigger

__all__ = ["Agenda", "Whens"]

Whens = Trigger | Mapping[str, Trigger]


@dataclass(frozen=True)
class _Alert:
    trigger: Trigger
    tell: Callable[[], None]


class Agenda:
    """Asks triggers which rows are due.

    Args:
        when: one trigger for all rows, or one for each.
        rows: the names of all rows.
        sources: the names of what they are measured on.

    Raises:
        SettingsError: something that is no trigger, or goes by a row that is not measured; a row without one.
    """

    def __init__(self, when: Whens, rows: Iterable[str], sources: Iterable[str]) -> None:
        self.all = frozenset(rows)
        self._stored = {f"{row}.{source}" if source else row for row in self.all for source in sources}
        self._alerts: list[_Alert] = []
        self.watched: set[str] = set()  # rows, as stored, whose values decide what is due
        self._scales: set[str] = set()  # of the clock
        if isinstance(when, Mapping):
            for name in when:
                if name not in self.all:
                    raise SettingsError(f"when={{{name!r}: ...}} names no row{did_you_mean(name, self.all)}")
            if missing := sorted(self.all - set(when)):
                raise SettingsError(f"when= has no trigger for {', '.join(map(repr, missing))}")
        self._when = dict(when) if isinstance(when, Mapping) else when
        for trigger in self._when.values() if isinstance(self._when, dict) else (self._when,):
            self.check(trigger)

    def check(self, trigger: Trigger) -> None:
        """Take note of the rows that a trigger goes by.

        Raises:
            SettingsError: it is none, or goes by a row that is not measured.
        """
        if not isinstance(trigger, Trigger):
            raise SettingsError(f"when={trigger!r} is no trigger; e.g. when=Every(optim_steps=100) | At(0)")
        for row in trigger.rows:
            if row not in self._stored:
                raise SettingsError(f"When({row!r}, ...) goes by a row that is not measured{self._near(row)}")
        self.watched |= trigger.rows
        self._scales |= trigger.scales

    def untold(self, clock: Clock) -> list[str]:
        """Return the scales that triggers go by and that the clock was never told of."""
        told = {"frames": clock.frames, "epochs": clock.epoch}
        return sorted(scale for scale in self._scales & set(told) if not told[scale])

    def _near(self, row: str) -> str:
        return did_you_mean(row, sorted(self._stored))

    def alert(self, trigger: Trigger, tell: Callable[[], None]) -> None:
        """Call a function whenever a trigger is due."""
        self.check(trigger)
        self._alerts.append(_Alert(trigger, tell))

    def rows(self, clock: Clock) -> frozenset[str]:
        """Return the rows that are due."""
        if not isinstance(self._when, dict):
            return self.all if self._when.due(clock) else frozenset()
        return frozenset([row for row, trigger in self._when.items() if trigger.due(clock)])

    def tell(self, clock: Clock) -> list[Callable[[], None]]:
        """Return what is to be called now."""
        return [alert.tell for alert in self._alerts if alert.trigger.due(clock)]
