"""The process that measures beside a training: it is told weights and batches, and tells what it measured."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from tensordict import TensorDictBase

from tdhook_train.observer.measure import Rows
from tdhook_train.observer.numerics import Numerics
from tdhook_train.observer.sources import Source
from tdhook_train.observer.station import Measurement, OfData, Station
from tdhook_train.observer.subject import Subject
from tdhook_train.schedule import Times

__all__ = ["BEGUN", "Due", "Failure", "Job", "Outcome", "Start", "main"]

BEGUN = b""  # what a worker says when it runs, and again when it has taken its start; then an outcome a job

_LOOK_FOR_PARENT_S = 2.0
_NICENESS = 10  # the training goes first


@dataclass(frozen=True)
class Start:
    """What a worker needs to know once.

    Args:
        subject: what is observed; pickled, it is private copies of the networks.
        methods: of each row.
        seed: of what methods draw.
        numerics: how the training's process computes.
    """

    subject: Subject
    methods: Rows
    seed: int
    numerics: Numerics = field(default_factory=Numerics)

    def station(self) -> Station:
        """Compute as the training's process does, and give what measures."""
        self.numerics.apply()
        return Station(self.methods, self.seed)


@dataclass(frozen=True)
class Due:
    """What is to be measured at a moment: which rows, and on which batches by name; None for one sent before."""

    now: Times
    rows: frozenset[str]
    sources: Sequence[tuple[str, Source | None]]


@dataclass(frozen=True)
class Job:
    """What is due, with the weights of the moment.

    With ``back`` the ticks before are forgotten first, but for these rows, as going back to a checkpoint needs.
    """

    due: Due
    weights: Mapping[str, TensorDictBase]
    back: Mapping[str, OfData] | None = None


@dataclass(frozen=True)
class Failure:
    """A row that was not measured, and why; the error itself where it can be sent."""

    row: str
    message: str
    error: Exception | None


@dataclass
class Outcome:
    """What became of a job."""

    now: Times
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    def failed(self, row: str, error: Exception) -> None:
        """Note an error of a method."""
        self.failures.append(Failure(row, f"{type(error).__name__}: {error}", error))

    def written(self) -> bytes:
        """Write it down; an error that cannot be written goes as its text."""
        try:
            message = pickle.dumps(self)
            pickle.loads(message)  # some exceptions can be written, but not read
        except Exception:  # whatever pickling somebody's exception raises
            self.failures = [Failure(failure.row, failure.message, None) for failure in self.failures]
            return pickle.dumps(self)
        return message


def main(handle: int) -> None:
    """Measure what comes in until the other end is closed.

    Args:
        handle: of the socket to the training.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C means the training, which closes the socket
    os.nice(_NICENESS)
    parent = os.getppid()
    with Connection(handle) as training:
        training.send_bytes(BEGUN)
        if (message := _next(training, parent)) is None:
            return
        start: Start = pickle.loads(message)
        station, sources = start.station(), dict[str, Source]()
        training.send_bytes(BEGUN)
        while (message := _next(training, parent)) is not None:
            training.send_bytes(_served(pickle.loads(message), start.subject, station, sources).written())


def _next(training: Connection, parent: int) -> bytes | None:
    try:
        while not training.poll(_LOOK_FOR_PARENT_S):
            if os.getppid() != parent:  # other children of a killed training may hold its end of the socket open
                return None
        return training.recv_bytes()
    except (EOFError, ConnectionError):
        return None


def _served(job: Job, subject: Subject, station: Station, sources: dict[str, Source]) -> Outcome:
    began, outcome = time.perf_counter(), Outcome(job.due.now)
    if job.back is not None:
        station.go_back(job.back)
    subject.take(job.weights)
    for name, sent in job.due.sources:
        source = sources[name] if sent is None else sent
        if source.fixed:
            sources[name] = source
        outcome.measurements.append(station.measure(subject, job.due.now, job.due.rows, (name, source), outcome.failed))
    outcome.seconds = time.perf_counter() - began
    return outcome
