"""Live edits as they come and go: begun and ended when due, each with a row and a mark on the time axis."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn

from tdhook_train.edit import Rewrite, Rewritten
from tdhook_train.errors import SettingsError
from tdhook_train.observer.agenda import Agenda
from tdhook_train.observer.live_edit import LiveEdit, Span, write
from tdhook_train.observer.measure import Row, Tick, see
from tdhook_train.observer.recorder import Recorder
from tdhook_train.observer.sources import Source
from tdhook_train.observer.station import Measurement
from tdhook_train.observer.subject import Subject
from tdhook_train.ops.join import Measured
from tdhook_train.schedule import Clock, Times

__all__ = ["Edits"]


class Edits:
    """The live edits of an observer.

    Args:
        edits: by the name of their rows.
        agenda: which rows are measured; told of the edits' triggers.
        recorder: where rows go.
        seed: of what is drawn.

    Raises:
        SettingsError: something that is no live edit, or a name that is taken.
    """

    def __init__(self, edits: Mapping[str, LiveEdit], agenda: Agenda, recorder: Recorder, seed: int) -> None:
        for name, edit in edits.items():
            if not isinstance(edit, LiveEdit):
                raise SettingsError(f"edits[{name!r}] is {edit!r}; e.g. LiveEdit(Ablate(...), when=At(1000), steps=50)")
            if name in agenda.all:
                raise SettingsError(f"edits[{name!r}] has the name of a row that is measured")
            agenda.check(edit.when)
        self._edits = dict(edits)
        self._recorder = recorder
        self._seed = seed
        self._spans: dict[str, tuple[Span, ExitStack, int | None]] = {}
        self._to_begin: dict[str, int | None] = {}  # spans of a checkpoint, and when they end

    def __bool__(self) -> bool:
        return bool(self._edits)

    def check(self, model: nn.Module) -> None:
        """Refuse, before anything has run, what names nothing."""
        for edit in self._edits.values():
            edit.check(model)

    def due(self, clock: Clock) -> list[str]:
        """Return the edits that begin now."""
        return [name for name, edit in self._edits.items() if edit.when.due(clock)]

    def end(self, now: Times, *, every: bool = False) -> None:
        """End the spans that are over, or every one."""
        with ExitStack() as each:  # all of them, whatever one of them raises
            for name, (_, undo, until) in list(self._spans.items()):
                if every or (until is not None and now.step >= until):
                    each.callback(self._note, name, now, active=False)
                    each.callback(undo.close)
                    del self._spans[name]

    def begin(self, name: str, model: nn.Module, now: Times) -> None:
        """Begin a span, or let one that lasts last longer."""
        edit = self._edits[name]
        until = None if edit.steps is None else now.step + edit.steps
        if name in self._spans:
            span, undo, _ = self._spans[name]
            self._spans[name] = (span, undo, until)
            return
        self._hold(name, until, model)
        self._note(name, now, active=True)

    def _hold(self, name: str, until: int | None, model: nn.Module) -> None:
        span = Span()
        self._spans[name] = (span, self._edits[name].held(model, span), until)

    def go_on(self, model: nn.Module) -> None:
        """Hold again what was held when a checkpoint was made."""
        while self._to_begin:
            self._hold(*self._to_begin.popitem(), model)

    def writes(self, name: str) -> bool:
        """Whether an edit writes weights."""
        return isinstance(self._edits[name].edit, Rewrite)

    def write(
        self,
        name: str,
        subject: Subject,
        now: Times,
        source: tuple[str, Source],
        optimizers: Iterable[torch.optim.Optimizer],
    ) -> None:
        """Write weights anew, from what one batch shows."""
        method, began = cast(Rewrite, self._edits[name].edit), time.perf_counter()
        tick = Tick(now, self._seed)
        with subject.open(tick.generator("model").initial_seed(), source[1].batch):
            parts = {n: p for n, p in see(subject, {name: [method]}, source[1], tick).items() if not _is_target(n)}
            # each network by draws of its own: members of an ensemble shall not become one
            told = {n: part.told(**tick.told(f"{name}/{n}", 0)) for n, part in parts.items()}
            measured = method.across(told)
            new = {n: method.rewritten(part.seen, part.model) for n, part in method.applies_to(told).items()}
            weights = subject.fingerprint()
        write(subject.model, new, optimizers)
        row = Row(name, measured, time.perf_counter() - began)
        self._recorder.commit(row, Measurement("", now, [row], weights, source[1].fingerprint), [method])
        self._recorder.log()
        self._mark(now, f"{name}: {_count(new)} weights written")

    def _note(self, name: str, now: Times, *, active: bool) -> None:
        measured = Measured({"active": torch.tensor(float(active))}, {"active": ()})
        row = Row(name, measured, 0.0)
        self._recorder.commit(row, Measurement("", now, [row], 0, 0), [self._edits[name].edit])
        self._recorder.log()
        self._mark(now, f"{name} {'begins' if active else 'ends'}")

    def _mark(self, now: Times, label: str) -> None:
        self._recorder.buffer.note("mark", step=now.step, frames=now.frames, label=label)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Measure a live model without them."""
        spans = [span for span, _, _ in self._spans.values()]
        for span in spans:
            span.left_out = True
        try:
            yield
        finally:
            for span in spans:
                span.left_out = False

    def state_dict(self) -> dict[str, Any]:
        """Return which spans last, and until which step."""
        return self._to_begin | {name: until for name, (_, _, until) in self._spans.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the spans of a checkpoint last again, and no others; nothing is noted."""
        with ExitStack() as each:
            while self._spans:
                each.callback(self._spans.popitem()[1][1].close)
        self._to_begin = {name: until for name, until in state.items() if name in self._edits}


def _is_target(network: str) -> bool:
    return any(part.startswith("target_") for part in network.split("."))


def _count(new: Mapping[str, Mapping[str, Rewritten]]) -> int:
    return int(sum(one.where.sum() for parameters in new.values() for one in parameters.values()))
