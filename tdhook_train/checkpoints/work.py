"""What is done with each checkpoint, here or in a process of its own: its weights go into a model that is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_train.checkpoints.fitting import fit
from tdhook_train.checkpoints.formats import Loading
from tdhook_train.checkpoints.listing import Listed
from tdhook_train.errors import CheckpointError
from tdhook_train.observer.measure import Rows
from tdhook_train.observer.numerics import Numerics
from tdhook_train.observer.sources import Source
from tdhook_train.observer.station import OfData, Station
from tdhook_train.observer.subject import Subject
from tdhook_train.observer.worker import Outcome
from tdhook_train.ops.fingerprint import fingerprint
from tdhook_train.schedule import Times
from tdhook_train.undo import kept_randomness

__all__ = ["Bench", "Block", "Done", "Plan", "Task", "content_of"]


@dataclass(frozen=True)
class Plan:
    """What is the same for every checkpoint.

    Args:
        build: makes the model, or the loss that holds it.
        methods: of each row.
        sources: what is measured on, by name and content hash.
        seed: of what methods draw, and of what ``build`` draws.
        initial: file of the weights at initialisation.
        keys: ``in_keys`` and ``out_keys`` of a plain module.
        loading: how checkpoints are read.
        context: what every pass is made in, such as autocast.
        numerics: how torch computes.
    """

    build: Callable[[], nn.Module]
    methods: Rows
    sources: Mapping[tuple[str, int], Source]
    initial: Path
    seed: int = 0
    keys: Mapping[str, Any] = field(default_factory=dict)
    loading: Loading = field(default_factory=Loading)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    numerics: Numerics = field(default_factory=Numerics)


@dataclass(frozen=True)
class Task:
    """A checkpoint, the moment it is of, and what it is measured on, by name and content hash."""

    checkpoint: Listed
    now: Times
    on: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Block:
    """Checkpoints that are measured one after another, and what comes before them: rows may compare with it.

    Args:
        todo: in order.
        rows: that are due.
        before: the checkpoints before the first of these, the nearest first, as far as they have no rows yet.
        last: rows of those before all that, by source.
        looks_back: whether a row may go by the one before.
    """

    todo: Sequence[Task]
    rows: frozenset[str]
    before: Sequence[Task] = ()
    last: Mapping[str, OfData] = field(default_factory=dict)
    looks_back: bool = False


@dataclass
class Done(Outcome):
    """What became of a checkpoint, and the content hash of its weights."""

    path: Path = Path()
    content: str = ""


class Bench:
    """One model, that checkpoint after checkpoint is put into.

    Args:
        plan: what is the same for all of them.
    """

    def __init__(self, plan: Plan) -> None:
        plan.numerics.apply()
        self._plan = plan
        with kept_randomness(plan.seed):
            self._model = plan.build()
        if not isinstance(self._model, nn.Module):
            raise CheckpointError(f"build() gave a {type(self._model).__name__}, which is no module")
        self._subject: Subject | None = None
        self._at: tuple[Path, frozenset[str]] | None = None  # what the station's last rows are of
        self._station = Station(plan.methods, plan.seed)

    def measure(self, block: Block) -> Iterator[Done]:
        """Measure checkpoints one after another; what a method or a file raises is noted in what became of it."""
        if block.looks_back and (not block.before or (block.before[0].checkpoint.path, block.rows) != self._at):
            self._go_to(block)
        for task in block.todo:
            self._at = None
            done = self._one(task, block.rows)
            if done.measurements and not done.failures:
                self._at = task.checkpoint.path, block.rows
            yield done

    def _go_to(self, block: Block) -> None:
        """Measure what comes before a block: of each row the nearest that can be."""
        self._station.go_back(block.last)
        missing = {name: set(block.rows) for name, _ in block.todo[0].on}
        data = dict(block.todo[0].on)
        for task in block.before:
            on = [(name, of) for name, of in task.on if missing.get(name) and data[name] == of]
            if not on:
                return
            done = self._one(replace(task, on=on), frozenset().union(*(missing[name] for name, _ in on)))
            for found in done.measurements:
                missing[found.source] -= {row.name for row in found.rows}

    def _one(self, task: Task, rows: Collection[str]) -> Done:
        listed, began = task.checkpoint, time.perf_counter()
        done = Done(task.now, path=listed.path)
        try:
            state = self._plan.loading.read(listed.path).state
            fit(self._model, state, listed.path)
            done.content = content_of(state)
        except CheckpointError as error:
            done.failed("checkpoint", error)
            return done
        subject = self._subject = self._subject or self._begun()
        with self._plan.context():
            for name, data in task.on:
                on = (name, self._plan.sources[name, data])
                done.measurements.append(self._station.measure(subject, task.now, rows, on, done.failed))
        done.seconds = time.perf_counter() - began
        return done

    def _begun(self) -> Subject:
        """Begin to observe the model, which by now has the dtype of the checkpoints."""
        subject = self._observed()
        for methods in self._plan.methods.values():
            for method in methods:
                method.check(subject.networks)
        subject.load_initial(self._plan.initial)
        return subject

    def _observed(self) -> Subject:
        return Subject(self._model, self._plan.keys.get("in_keys"), self._plan.keys.get("out_keys"))

    def write_initial(self, first: Path | None) -> None:
        """Write the weights at initialisation: those of a checkpoint, or as they were built.

        Raises:
            CheckpointError: that one cannot be used.
        """
        if first is not None:
            fit(self._model, self._plan.loading.read(first).state, first)
        subject = self._observed()
        subject.remember_initial()
        subject.save_initial(self._plan.initial)


def content_of(state: Mapping[str, Any]) -> str:
    """Hash the weights of a checkpoint: what else lies in its file may differ, or be written anew."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return f"{fingerprint(TensorDict(tensors)) % 2**64:016x}"
