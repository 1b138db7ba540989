"""What is done at each moment of a training: asking what is due, measuring it, and what follows from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from tdhook_train.errors import NetworkError
from tdhook_train.observer.agenda import Agenda
from tdhook_train.observer.edits import Edits
from tdhook_train.observer.subject import Subject
from tdhook_train.observer.ticks import Ticks
from tdhook_train.schedule.clock import last_said

__all__ = ["Rounds"]

_SAID = 16  # rows that are read again after a resume, for the last that was not NaN


_TELL = {
    "frames": "observer.collected(data) for each batch, or observer.clock.frames = collected",
    "epochs": "observer.clock.epoch = epoch",
}


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
        self._goes_on = False  # whether it is clear that rows of later steps belong to this training
        self._closed = False
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
        stored = self.ticks.recorder.buffer.folder("initial") / "weights.pt"
        if stored.is_file():
            subject.load_initial(stored)
        else:
            subject.remember_initial()
            subject.save_initial(stored)
        if self._waiting and (self.subject is None or self.subject.keys != subject.keys):
            self.ticks.begin_in_background(subject, self._waiting)
        self.subject = subject
        self._edits.go_on(subject.model)

    def go(self, model: nn.Module, done: frozenset[str] = frozenset()) -> bool:
        """Do what is due now, and what that makes due, but for rows that are done; return whether any was measured."""
        clock, edits = self.clock, self._edits
        before, begin, told = done, dict[str, None](), set[Callable[[], None]]()
        self.keep(model)
        while True:
            rows, calls = self.agenda.rows(clock) - done, [c for c in self.agenda.tell(clock) if c not in told]
            told |= set(calls)
            begin |= dict.fromkeys(edits.due(clock) if edits else ())
            clock.asked()
            if rows and self._measure(model, rows):
                done |= rows
            for call in calls:
                call()
                if self._closed:
                    return done != before
            if not clock.fresh:  # no row that a trigger goes by has come
                break
        for name in begin:  # last of all: every row of a step holds the weights before
            self._edit(name, model)
        return done != before

    def tell(self) -> None:
        """Call the alerts that the last rows set off."""
        calls = self.agenda.tell(self.clock) if self.clock.fresh else []
        self.clock.asked()
        for call in calls:
            call()

    def keep(self, model: nn.Module) -> None:
        """Hold the spans that last, and end those that are over."""
        if self._edits:
            self._edits.go_on(model)
            self._edits.end(self.clock.now)

    def finish(self, model: nn.Module) -> bool:
        """Measure what was not measured at this step, and do what that makes due."""
        for scale in self.agenda.untold(self.clock):
            warnings.warn(
                f"what goes by {scale} was never due: the observer was not told of them; {_TELL[scale]}", stacklevel=3
            )
        self.clock.asked()
        rows = frozenset(row for row in self.agenda.all if self._measured.get(row) != self.clock.step)
        measured = bool(rows) and self._measure(model, rows, free=True)
        self.ticks.take(wait=True)
        while self.clock.fresh:
            self.go(model, self.agenda.all)
            self.ticks.take(wait=True)
        return measured

    def close(self) -> None:
        """End every edit, and let go of the model."""
        self.subject, self._closed = None, True
        self.clock.fresh = {}
        with ExitStack() as each:
            each.callback(self.ticks.close)
            each.callback(self._edits.end, self.clock.now, every=True)

    @property
    def spans(self) -> dict[str, int | None]:
        """The edits that are held, and the step at which each ends."""
        return self._edits.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        fresh = {row: len(values) for row, values in self.clock.fresh.items()}
        return {"measured": dict(self._measured), "fresh": fresh, "edits": self._edits.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from these."""
        self._measured, self._goes_on = dict(state["measured"]), True
        self._edits.load_state_dict(state["edits"])
        if self.subject is not None:  # what is collected before the next step is collected with them
            self._edits.go_on(self.subject.model)

    def remember(self, fresh: Mapping[str, int]) -> None:
        """Take the last rows that are stored for those that triggers compare new ones with.

        Args:
            fresh: how many rows were new to triggers when the checkpoint was made, by name.
        """
        clock, buffer = self.clock, self.ticks.recorder.buffer
        clock.known, clock.fresh = {}, {}
        for name in self.agenda.watched & set(buffer):
            last = buffer[name].last(_SAID + fresh.get(name, 0))
            rows = [dict(last[i].items(include_nested=True, leaves_only=True)) for i in range(len(last))]
            new = rows[-fresh[name] :] if fresh.get(name) else []
            if known := rows[: len(rows) - len(new)]:
                clock.known[name] = last_said(known)
            if new:
                clock.fresh[name] = new

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
            if not self.optimizers:
                said = "pass it: ObservedLoss(loss, observer, optimizer), or observer.optimizers.append(optimizer)"
                warnings.warn(
                    f"{name!r} writes weights whose optimizer is not known, and keeps its moments; {said}", stacklevel=2
                )
            with self._edits.left_out():
                self._edits.write(name, subject, self.clock.now, source, self.optimizers)

    def _observed(self, model: nn.Module) -> Subject:
        if not self._goes_on:
            self.ticks.recorder.refuse_going_back(self.clock.step)
            self._goes_on = True
        if self.subject is None or self.subject.model is not model:
            self.attach(Subject(model))
        assert self.subject is not None
        return self.subject
