"""What a sweep has done: rows in its buffer, and notes of which checkpoint each is of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.checkpoints.listing import Listed
from tdhook_train.checkpoints.work import Done
from tdhook_train.errors import CheckpointError, RunExistsError, WorkerError
from tdhook_train.observer.measure import Rows
from tdhook_train.observer.recorder import Recorder
from tdhook_train.observer.station import OfData
from tdhook_train.observer.ticks import OnError

__all__ = ["Log"]


@dataclass(frozen=True)
class _Mark:
    """A checkpoint that is done: what it held, the artifacts that have a row of it, the step done before it then."""

    content: str
    rows: frozenset[str] = field(default_factory=frozenset)
    before: int | None = None


class Log:
    """Rows and notes of a sweep in its buffer.

    Args:
        buffer: where they are kept.
        methods: of each row.
        sources: names of what is measured on.
        drawn: what rows follow from beside methods and data, such as the seed.
        on_error: what an error leads to.

    Raises:
        RunExistsError: the buffer holds rows that are of no sweep, or of one with another seed.
        SchemaError: it holds rows of other settings.
    """

    def __init__(
        self,
        buffer: ArtifactBuffer,
        methods: Rows,
        sources: Iterable[str],
        drawn: Mapping[str, Any],
        on_error: OnError,
    ) -> None:
        self.buffer = buffer
        self._methods, self._sources, self._on_error = methods, tuple(sources), on_error
        self._recorder = Recorder(buffer, methods, ())
        back = [row for row in methods if any(method.looks_back for method in methods[row])]
        self._look_back = frozenset(self._name_of(row)(source) for row in back for source in self._sources)
        self._marks = _marks(buffer)
        self._refuse_others(drawn)
        buffer.note("sweep", step=0, **drawn)
        for name in buffer:  # of checkpoints that were not finished
            left = {step for step, mark in self._marks.items() if name in mark.rows}
            buffer.drop(name, [step for step in set(buffer[name].steps.tolist()) if step not in left])

    def _refuse_others(self, drawn: Mapping[str, Any]) -> None:
        begun = self.buffer.events("sweep")
        for name in self.buffer if not begun else ():
            if len(steps := self.buffer[name].steps):
                raise RunExistsError(
                    f"{self.buffer.path} holds rows of step {int(steps[0])}, which no sweep made: sweep into another "
                    "folder, or pass overwrite=True"
                )
        for what, value in drawn.items() if self._marks else ():
            if (before := begun[-1].get(what, value)) != value:
                raise RunExistsError(
                    f"{self.buffer.path} was swept with {what}={before!r}, not {what}={value!r}: sweep into another "
                    "folder, or pass overwrite=True"
                )
        for row, methods in self._methods.items():
            for name in map(self._name_of(row), self._sources):
                if name in self.buffer:
                    self.buffer.declare(name, settings=[method.settings() for method in methods])

    @staticmethod
    def _name_of(row: str) -> Callable[[str], str]:
        return lambda source: f"{row}.{source}" if source else row

    # ------------------------------------------------------------------ what there is to do

    def due(self, one: Listed, content_of: Callable[[Path], str]) -> frozenset[str]:
        """Return the rows that a checkpoint has not yet.

        Raises:
            RunExistsError: it was measured, and is another one now.
        """
        mark = self._marks.get(one.step)
        if mark is None:
            return frozenset(self._methods)
        if (content := content_of(one.path)) != mark.content:
            raise RunExistsError(
                f"{self.buffer.path} holds rows of step {one.step} that were measured on other weights than {one.path} "
                f"has now ({mark.content}, {content}); sweep into another folder, or pass overwrite=True"
            )
        return frozenset(row for row in self._methods if not self._has(mark, row))

    def _has(self, mark: _Mark, row: str) -> bool:
        return all(map(mark.rows.__contains__, map(self._name_of(row), self._sources)))

    def has(self, step: int, rows: Iterable[str]) -> bool:
        """Whether these rows are stored of a step."""
        mark = self._marks.get(step)
        return mark is not None and all(self._has(mark, row) for row in rows)

    def stale(self, step: int) -> bool:
        """Whether a checkpoint was measured before the one that comes before it: rows may compare with that."""
        mark = self._marks.get(step)
        return mark is not None and mark.before != self._before(step)

    def _before(self, step: int) -> int | None:
        return max((done for done in self._marks if done < step), default=None)

    def last(self, step: int, rows: Iterable[str]) -> dict[str, OfData]:
        """Return, by source, the last rows that are stored of earlier steps."""
        found = {}
        for source in self._sources:
            stored = {row: one for row in rows if (one := self._row_before(self._name_of(row)(source), step))}
            if stored:
                newest = max(stored.values(), key=lambda one: one[0])[1]
                same = {row: kept for row, (_, data, kept) in stored.items() if data == newest}
                found[source] = OfData(newest, same)
        return found

    def _row_before(self, name: str, step: int) -> tuple[int, int, TensorDictBase] | None:
        if name not in self.buffer:
            return None
        steps = self.buffer[name].steps
        earlier = steps[steps < step]
        if not len(earlier):
            return None
        row = self.buffer[name].at(int(earlier[-1])).clone()  # what is read may be written over
        meta = row.pop("meta")
        return int(meta["step"]), int(meta["data"]), row

    # ------------------------------------------------------------------ what was done

    def commit(self, done: Done) -> None:
        """Commit what was measured of a checkpoint, and note that it is done."""
        step = done.now.step
        rows = [(row, found) for found in done.measurements for row in found.rows]
        names = {self._name_of(row.name)(found.source) for row, found in rows}
        mark = self._marks.get(step, _Mark(done.content, before=self._before(step)))
        if again := mark.rows & names:
            self._note(done, mark.rows - names, mark.before)
            for name in again:
                self.buffer.drop(name, [step])
        for row, found in rows:
            self._recorder.commit(row, found)
        if rows:
            before = self._before(step) if mark.rows & self._look_back <= names else mark.before
            self._marks[step] = self._note(done, mark.rows | names, before)
        for failure in done.failures:
            error = failure.error or WorkerError(failure.message)
            self._failed(str(done.path), failure.row, step, error)

    def _note(self, done: Done, rows: frozenset[str], before: int | None) -> _Mark:
        mark = _Mark(done.content, rows, before)
        self.buffer.note(
            "checkpoint",
            step=done.now.step,
            path=str(done.path),
            content=mark.content,
            rows=sorted(rows),
            before=before,
        )
        return mark

    def unusable(self, path: Path, error: Exception) -> None:
        """Note a checkpoint that cannot be used."""
        self._failed(str(path), "checkpoint", -1, error)

    def _failed(self, path: str, row: str, step: int, error: Exception) -> None:
        self.buffer.note("error", step=step, row=row, path=path, error=f"{type(error).__name__}: {error}")
        said = "" if isinstance(error, CheckpointError) else f"measuring {row!r} of {path} failed: "
        if self._on_error == "raise":
            if said:
                error.add_note(f"while {row!r} of {path} was measured")
            raise error
        if self._on_error == "warn":
            warnings.warn(f"{said}{error}", stacklevel=2)


def _marks(buffer: ArtifactBuffer) -> dict[int, _Mark]:
    """Read what earlier sweeps have done."""
    marks: dict[int, _Mark] = {}
    for note in buffer.events("checkpoint"):
        marks[note["step"]] = _Mark(note["content"], frozenset(note["rows"]), note["before"])
    return {step: mark for step, mark in marks.items() if mark.rows}
