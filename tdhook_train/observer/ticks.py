"""What happens when a tick is due: on what, here or in the background, and what becomes of the rows."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal

from tdhook_train.errors import WorkerError
from tdhook_train.observer.background import Background
from tdhook_train.observer.meter import Meter
from tdhook_train.observer.recorder import Recorder
from tdhook_train.observer.sources import Given, Live, Source, Sources
from tdhook_train.observer.station import Measurement, Station
from tdhook_train.observer.subject import Subject
from tdhook_train.observer.worker import Due, Outcome
from tdhook_train.schedule import Budget, Clock, Times

__all__ = ["OnError", "Ticks"]

OnError = Literal["raise", "warn", "skip"]


class Ticks:
    """Measures, here or in the background, and commits; what is skipped or fails is noted in the run.

    Args:
        station: what measures.
        sources: on what.
        recorder: where rows go.
        budget: share of wall time that observing may take.
        on_error: what an error of a method does to the training.
    """

    def __init__(
        self, station: Station, sources: Sources, recorder: Recorder, budget: Budget | None, on_error: OnError
    ) -> None:
        self.station = station
        self.sources = sources
        self.recorder = recorder
        self.budget = budget
        self.on_error = on_error
        self.meter = Meter()
        self.clock = Clock()
        self.watched: set[str] = set()  # rows whose values decide what is due: the clock is told of them
        self.live: dict[Live, Given] = {}  # what may be measured on now
        self._worker: Background | None = None
        self._folder = recorder.buffer.folder("probe_sets")

    def begin_in_background(self, subject: Subject, waiting: int) -> None:
        """Measure in a process of its own from now on; what another one has under way is waited for."""
        self.take(wait=True)
        if self._worker is not None:
            self._worker.close()
        self._worker = Background(subject, self.station.methods, self.station.seed, waiting)

    def measure(self, subject: Subject, now: Times, rows: frozenset[str], *, free: bool = False) -> bool:
        """Measure a model, or hand it over to be measured.

        Args:
            subject: the model.
            now: the moment.
            rows: which are due.
            free: whatever the budget and however many wait.

        Returns:
            Whether rows were committed, or will be.
        """
        meter, began = self.meter, time.perf_counter()
        if not free and self.budget and not self.budget.allows(meter.spent_s, meter.last_s, meter.training_s):
            self._skip(now, "budget", f"{meter.share:.2%} of training time spent observing")
            return False
        try:
            ready = self.ready(now)
            if self._worker is None:
                return self._here(subject, now, rows, ready)
            return self._beside(self._worker, subject, Due(now, rows, list(ready)), wait=free)
        finally:
            meter.add(time.perf_counter() - began, budgeted=self.budget is not None)

    def ready(self, now: Times) -> Iterator[tuple[str, Source]]:
        """Yield what can be measured on now, by name; what is not ready is noted."""

        def skip(why: str, detail: str) -> None:
            self._skip(now, why, detail)
            if now.step == 0:  # later moments come again
                said = "ask for no more frames than the first batch has, or take ProbeSet.rollout(make_env, policy)"
                warnings.warn(f"step 0 is not measured on {detail}; {said}", stacklevel=2)

        return self.sources.ready(self.live, self._folder, skip)

    def _here(self, subject: Subject, now: Times, rows: frozenset[str], ready: Iterable[tuple[str, Source]]) -> bool:
        committed = False
        for name, source in ready:
            found = self.station.measure(subject, now, rows, (name, source), lambda *why: self._failed(now, *why))
            committed |= self._commit(found)
        if committed:
            self.recorder.log()
        return committed

    def _beside(self, worker: Background, subject: Subject, due: Due, *, wait: bool) -> bool:
        try:
            handed = bool(due.sources) and worker.hand_over(subject, due, wait=wait)
        except WorkerError as error:
            self._failed(due.now, "background", error)
            return False
        if due.sources and not handed:
            self.meter.dropped += 1
            self._skip(due.now, "background", "the process that measures is behind")
        return handed

    def take(self, *, wait: bool = False) -> None:
        """Commit what was measured in the background by now.

        Args:
            wait: for everything that was handed over.
        """
        if self._worker is None or not (self._worker.busy or wait):
            return
        began = time.perf_counter()
        try:
            self._worker.collect(wait=wait)
        except WorkerError as error:
            self._failed(self.clock.now, "background", error)
        finally:
            came = [self._worker.inbox.popleft() for _ in range(len(self._worker.inbox))]
            try:
                _each(partial(self._settle, outcome) for outcome in came)
            finally:
                self.meter.more(time.perf_counter() - began)

    def _settle(self, outcome: Outcome) -> None:
        self.meter.beside_s += outcome.seconds
        committed = [self._commit(found) for found in outcome.measurements]
        if any(committed):
            self.recorder.log()
        _each(
            partial(self._failed, outcome.now, failure.row, failure.error or WorkerError(failure.message))
            for failure in outcome.failures
        )

    def go_back(self) -> None:
        """Forget the ticks before, but for the last rows that are stored, as going back to a checkpoint needs."""
        last = {name: self.recorder.last(name, fixed=fixed) for name, fixed in self.sources.fixed.items()}
        self.station.go_back(last)
        if self._worker is not None:
            self._worker.go_back(last)

    def close(self) -> None:
        """Let go of batches, and end the process in the background, whatever it does."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self.sources.close()
        self.live.clear()
        self.station.go_back({})

    def _commit(self, found: Measurement) -> bool:
        for row in found.rows:
            name = self.recorder.commit(row, found)
            if name in self.watched:
                self.clock.fresh.setdefault(name, []).append(row.measured.values)
            self.meter.by_method_s[row.name] += row.cost_s
        return bool(found.rows)

    def _skip(self, now: Times, why: str, detail: str) -> None:
        self.recorder.buffer.note("skip", step=now.step, frames=now.frames, why=why, detail=detail)

    def _failed(self, now: Times, row: str, error: Exception) -> None:
        self.recorder.buffer.note("error", step=now.step, row=row, error=f"{type(error).__name__}: {error}")
        if self.on_error == "raise":
            error.add_note(f"while {row!r} was measured at step {now.step}")
            raise error
        if self.on_error == "warn":
            warnings.warn(f"measuring {row!r} at step {now.step} failed: {error}", stacklevel=2)


def _each(calls: Iterable[Callable[[], object]]) -> None:
    """Call all of them, whatever one of them raises; the first error is raised afterwards."""
    first: Exception | None = None
    for call in calls:
        try:
            call()
        except Exception as error:  # whatever a method raised in the background
            first = first or error
    if first is not None:
        raise first
