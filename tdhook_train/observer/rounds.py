"""What is done at each moment of a training: asking what is due, measuring it, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from tdhook_train.errors import NetworkError
from tdhook_train.observer.agenda import Agenda
from tdhook_train.observer.edits import Edits
from tdhook_train.observer.subject import Subject
from tdhook_train.observer.ticks import Ticks

__all__ = ["Rounds"]


class Rounds:
    """Goes through what is due at a moment, in this order: spans that end, rows, alerts, edits that begin.

    Args:
        agenda: what is due when.
        ticks: what measures.
        edits: of the live network.
        waiting: how many snapshots may wait for a process in the background; 0 measures here.
    """

    def __init__(self, agenda: Agenda, ticks: Ticks, edits: Edits, waiting: int) -> None:
        self.agenda = agenda
        self.ticks = ticks
        self.clock = ticks.clock
        self.subject: Subject | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        self._edits = edits
        self._waiting = waiting
        self._measured: dict[str, int] = {}  # the last step of each row
        self._begun = False
        ticks.watched = agenda.watched

    def attach(self, subject: Subject) -> None:
        """Take a model to observe: see :meth:`Observer.attach`."""
        if self.subject is not None and self.subject.model is not subject.model:
            known, given = (type(one.model).__name__ for one in (self.subject, subject))
            raise NetworkError(f"this observer observes another {known}; make one more observer for this {given}")
        for methods in self.ticks.station.methods.values():
            for method in methods:
                method.check(subject.networks)
        self._edits.check(subject.model)
        self.subject = subject
        stored = self.ticks.recorder.buffer.folder("initial") / "weights.pt"
        if stored.is_file():
            subject.load_initial(stored)
        else:
            subject.remember_initial()
            subject.save_initial(stored)
        if self._waiting:
            self.ticks.begin_in_background(subject, self._waiting)

    def go(self, model: nn.Module) -> bool:
        """Do what is due now, and what that makes due; return whether anything was measured."""
        clock, edits = self.clock, self._edits
        done: frozenset[str] = frozenset()
        if edits:
            edits.go_on(model)
            edits.end(clock.now)
        while True:
            rows, calls = self.agenda.rows(clock), self.agenda.tell(clock)
            begin = edits.due(clock) if edits else ()
            clock.asked()
            rows -= done
            if rows and self._measure(model, rows):
                done |= rows
            for call in calls:
                call()
            for name in begin:
                self._edit(name, model)
            if not clock.fresh:  # no row that a trigger goes by has come
                return bool(done)

    def finish(self, model: nn.Module) -> bool:
        """Measure what was not measured at this step, and do what that makes due."""
        self.clock.asked()
        rows = frozenset(row for row in self.agenda.all if self._measured.get(row) != self.clock.step)
        measured = bool(rows) and self._measure(model, rows, free=True)
        self.ticks.take(wait=True)
        while self.clock.fresh:
            self.go(model)
            self.ticks.take(wait=True)
        return measured

    def close(self) -> None:
        """End every edit, and let go of the model."""
        self.subject = None
        with ExitStack() as each:
            each.callback(self.ticks.close)
            each.callback(self._edits.end, self.clock.now, every=True)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"measured": dict(self._measured), "edits": self._edits.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from these."""
        self._measured, self._begun = dict(state["measured"]), True
        self._edits.load_state_dict(state["edits"])

    def remember(self) -> None:
        """Take the last rows that are stored for those that triggers compare new ones with."""
        buffer = self.ticks.recorder.buffer
        for row in self.agenda.watched & set(buffer):
            self.clock.known[row] = dict(buffer[row].last()[0].items(include_nested=True, leaves_only=True))

    def _measure(self, model: nn.Module, rows: frozenset[str], *, free: bool = False) -> bool:
        subject = self._observed(model)
        with nullcontext() if subject.is_loss else self._edits.left_out():
            measured = self.ticks.measure(subject, self.clock.now, rows, free=free)
        if measured:
            self._measured |= dict.fromkeys(rows, self.clock.step)
        return measured

    def _edit(self, name: str, model: nn.Module) -> None:
        subject = self._observed(model)
        if not self._edits.writes(name):
            self._edits.begin(name, model, self.clock.now)
        elif (source := next(self.ticks.ready(self.clock.now), None)) is not None:
            self._edits.write(name, subject, self.clock.now, source, self.optimizers)

    def _observed(self, model: nn.Module) -> Subject:
        if not self._begun:
            self.ticks.recorder.refuse_going_back(self.clock.step)
            self._begun = True
        if self.subject is None or self.subject.model is not model:
            self.attach(Subject(model))
        assert self.subject is not None
        return self.subject
