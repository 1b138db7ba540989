"""What is done with each checkpoint, here or in a process of its own: its weights go into a model that is measured."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tdhook_train.checkpoints.fitting import fit
from tdhook_train.checkpoints.formats import Loading
from tdhook_train.checkpoints.listing import Listed
from tdhook_train.errors import CheckpointError
from tdhook_train.observer.measure import Rows
from tdhook_train.observer.numerics import Numerics
from tdhook_train.observer.sources import Source
from tdhook_train.observer.station import Station
from tdhook_train.observer.subject import Subject
from tdhook_train.observer.worker import Outcome
from tdhook_train.schedule import Times
from tdhook_train.undo import kept_randomness

__all__ = ["Bench", "Block", "Done", "Plan", "content_of"]


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
class Block:
    """Checkpoints that are measured one after another, and the one before them: rows may compare with it.

    Args:
        before: the one before the first; None where there is none.
        todo: each with the moment it is of, and what it is measured on by name and content hash.
    """

    before: tuple[Listed, Times, Sequence[tuple[str, int]]] | None
    todo: Sequence[tuple[Listed, Times, Sequence[tuple[str, int]]]]


@dataclass
class Done(Outcome):
    """What became of a checkpoint, and the content hash of its file."""

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
        self._last: Path | None = None  # what the station's last rows are of
        self._station = Station(plan.methods, plan.seed)

    def measure(self, block: Block) -> Iterator[Done]:
        """Measure checkpoints one after another; what a method or a file raises is noted in what became of it."""
        if block.before is None:
            self._station.go_back({})
        elif block.before[0].path != self._last:
            self._station.go_back({})
            self._one(*block.before)
        for checkpoint in block.todo:
            yield self._one(*checkpoint)

    def _one(self, listed: Listed, now: Times, sources: Sequence[tuple[str, int]]) -> Done:
        began, done = time.perf_counter(), Done(now, path=listed.path)
        try:
            fit(self._model, self._plan.loading.read(listed.path).state, listed.path)
            done.content = content_of(listed.path)
            subject = self._subject = self._subject or self._begun()
        except CheckpointError as error:
            done.failed("checkpoint", error)
            return done
        with self._plan.context():
            for name, data in sources:
                on = (name, self._plan.sources[name, data])
                measured = self._station.measure(subject, now, list(self._plan.methods), on, done.failed)
                done.measurements.append(measured)
        self._last = listed.path
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
        """Write the weights at initialisation: those of a checkpoint, or as they were built."""
        if first is not None:
            fit(self._model, self._plan.loading.read(first).state, first)
        subject = self._observed()
        subject.remember_initial()
        subject.save_initial(self._plan.initial)


def content_of(path: Path) -> str:
    """Hash the bytes of a file, or of every file of a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()
