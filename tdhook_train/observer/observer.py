"""The observer: when due, it measures a model in isolation and commits the rows."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, cast

from tensordict import TensorDictBase
from torch import nn

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import (
    ClosedError,
    NetworkError,
    SettingsError,
    did_you_mean,
)
from tdhook_train.method import Method
from tdhook_train.observer.measure import Row, Tick, measure, rows_of
from tdhook_train.observer.meter import Meter
from tdhook_train.observer.recorder import Recorder
from tdhook_train.observer.sources import Live, On, Source, Sources
from tdhook_train.observer.subject import Subject
from tdhook_train.observer.trajectories import copied
from tdhook_train.schedule import Budget, Clock, Trigger
from tdhook_train.undo import Undo

__all__ = ["Observer"]


class Observer:
    """Runs methods on a model in training, when due, and commits one row a method.

    The training ends in the same bits as without: networks are measured in isolation, and what a method draws comes
    from a generator of its own, seeded by (seed, step).

    Args:
        methods: what to measure, by the name of its rows; several methods in a list share a row.
        when: which moments; see :mod:`tdhook_train.schedule`.
        into: an :class:`~tdhook_train.buffer.ArtifactBuffer`, or the folder to make one in.
        on: ``"batch"`` (the one the training is about to use), ``"collected"`` (the last one that :meth:`collected`
            was told of, in the order of time), a :class:`~tdhook_train.observer.ProbeSet`, or several of these by name;
            rows of ``{"first": ...}`` are then named ``probe.first``.
        budget: share of wall time that observing may take; ticks past it are skipped and the skip is recorded.
        seed: of what methods draw.
        on_error: an error of a method stops the training (``"raise"``), warns (``"warn"``) or is only recorded
            (``"skip"``); in no case is a row half written.
        loggers: TorchRL's or Lightning's, one or several, which are told the mean of each floating-point key.
        resume: go on in a folder that already holds a run.
        overwrite: replace the run in that folder.

    Raises:
        RunExistsError: the folder already holds a run.
        SettingsError: nothing to measure, or something that is no method.

    Example:
        >>> observer = Observer({"probe": RidgeProbe(target="y")}, when=Every(optim_steps=100), into="runs/one")
        ... # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913 - the one place where a user says everything
        self,
        methods: Mapping[str, Method | Sequence[Method]],
        *,
        when: Trigger,
        into: ArtifactBuffer | str | os.PathLike[str],
        on: On = "batch",
        budget: Budget | None = None,
        seed: int = 0,
        on_error: Literal["raise", "warn", "skip"] = "raise",
        loggers: Any = (),
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.methods = rows_of(methods)
        if not isinstance(when, Trigger):
            raise SettingsError(f"when={when!r} is no trigger; e.g. when=Every(optim_steps=100) | At(0)")
        if on_error not in ("raise", "warn", "skip"):
            raise SettingsError(f"on_error={on_error!r}{did_you_mean(on_error, ('raise', 'warn', 'skip'))}")
        self.when, self.budget, self.seed, self.on_error = when, budget, seed, on_error
        self.sources = Sources(on)
        self.buffer = _opened(into, self.sources, resume=resume, overwrite=overwrite)
        self._recorder = Recorder(self.buffer, self.methods, loggers)
        self.clock = Clock()
        self.meter = Meter()
        self.subject: Subject | None = None
        self.steps_taken: int | None = None  # optimizer steps so far, where a front door counts them
        self.undo = Undo()  # what front doors put on models and optimizers, taken off by close()
        self._paused = 0
        self._closed = False
        self._measured_step: int | None = None
        self._live: dict[Live, TensorDictBase | None] = {}  # what may be measured on now
        self._memo: dict[str, tuple[int, dict[str, dict[Any, Any]]]] = {}  # by source: of which data, and what

    # ------------------------------------------------------------------ what is observed

    def attach(self, model: nn.Module, *, in_keys: list[str] | None = None, out_keys: list[str] | None = None) -> None:
        """Begin to observe a model: check what can be checked now, and remember its weights as the initial ones.

        Called by the first :meth:`step` where nobody called it before; front doors call it when they are made.

        Raises:
            PathError: a layer pattern that matches no module.
            NetworkError: the model holds no network, or ``networks=`` names none, or another model is observed.
        """
        self._check_open()
        if self.subject is not None and self.subject.model is not model:
            known, given = (type(m).__name__ for m in (self.subject.model, model))
            raise NetworkError(f"this observer observes another {known}; make one more observer for this {given}")
        subject = Subject(model, in_keys, out_keys)
        for methods in self.methods.values():
            for method in methods:
                method.check(subject.networks)
        self.subject = subject
        self._memo.clear()
        stored = self.buffer.folder("initial") / "weights.pt"
        if stored.is_file():
            subject.load_initial(stored)
        else:
            subject.remember_initial()
            subject.save_initial(stored)

    # ------------------------------------------------------------------ as training goes on

    def step(
        self,
        model: nn.Module,
        batch: TensorDictBase | None = None,
        *,
        step: int | None = None,
        frames: int | None = None,
        epoch: int | None = None,
    ) -> bool:
        """Say where the training is, and measure where that is due.

        Args:
            model: the loss or module in training.
            batch: what it is about to train on; needed for ``on="batch"``.
            step: optimizer steps behind the present weights; one more than the last time where it is not given.
            frames: environment frames so far, where they have changed.
            epoch: likewise.

        Returns:
            Whether rows were committed.
        """
        clock = self.clock
        clock.step = step if step is not None else clock.step + (clock.before is not None)
        clock.frames = clock.frames if frames is None else frames
        clock.epoch = clock.epoch if epoch is None else epoch
        clock.batches += 1
        clock.seconds = self.meter.elapsed_s
        self._live["batch"] = batch if self.sources.wants("batch") else None
        if not self._closed:
            self.sources.refresh(clock)
        due = not self._closed and not self._paused and self.when.due(clock)
        clock.asked()
        return due and self._tick(model)

    def collected(self, batch: TensorDictBase, *, frames: int | None = None) -> None:
        """Say what was just collected: what ``on="collected"`` is measured on, and how far the frames are.

        Args:
            batch: as a collector gives it, ``[time]`` or ``[environments, time]``; copied where it is measured on.
            frames: environment frames so far; as many more as the batch holds, if None.
        """
        self.clock.frames = self.clock.frames + batch.numel() if frames is None else frames
        if self.sources.wants("collected"):
            self._live["collected"] = copied(batch)

    def count_steps(self) -> None:
        """Begin to count optimizer steps, from the present one on, unless they are counted already."""
        if self.steps_taken is None:  # else the observer goes on from a checkpoint
            self.steps_taken = self.clock.step

    def count_step(self, *_: Any) -> None:
        """Count one optimizer step."""
        self.steps_taken = (self.steps_taken or 0) + 1

    def finish(self, *, step: int | None = None) -> bool:
        """Measure the last weights, unless they have been measured.

        Args:
            step: optimizer steps behind them; known without it where a front door counts steps.
        """
        if self._closed or self.subject is None:
            return False
        for source in self.sources.unready():
            warnings.warn(f"nothing was measured on {source!r}: it never became complete", stacklevel=2)
        counted = self.clock.step if self.steps_taken is None else self.steps_taken
        self.clock.step = counted if step is None else step
        self.clock.seconds = self.meter.elapsed_s
        self.clock.asked()
        return self._measured_step != self.clock.step and self._tick(self.subject.model, free=True)

    @property
    def scalars(self) -> dict[str, float]:
        """What loggers were told last, by ``row/key``."""
        return dict(self._recorder.scalars)

    def mark(self, label: str) -> None:
        """Put an event on every time axis, e.g. ``observer.mark("learning rate drop")``."""
        self._check_open()
        self.buffer.note("mark", step=self.clock.step, frames=self.clock.frames, label=label)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Measure nothing inside the block; clocks go on."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def close(self) -> None:
        """Take off every hook and let go of the model and the buffer. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self.undo.close()
            self.subject = None
            self._live.clear()
            self._memo.clear()
            self.sources.close()
            self.buffer.close()

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint of the training."""
        clock = self.clock.state_dict()
        probe_sets = self.sources.state_dict(self.buffer.folder("probe_sets"))
        taken, measured = self.steps_taken, self._measured_step
        return {"clock": clock, "measured_step": measured, "steps_taken": taken, "probe_sets": probe_sets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: rows of later steps are dropped, passed boundaries do not fire again."""
        self._check_open()
        self.clock.load_state_dict(dict(state["clock"]))
        self._measured_step = state["measured_step"]
        self.steps_taken = state["steps_taken"]
        self.sources.load_state_dict(state.get("probe_sets", {}), self.buffer.folder("probe_sets"))
        self._recorder.forget()
        self.buffer.truncate(after_step=self.clock.step)

    # ------------------------------------------------------------------ a tick

    def _tick(self, model: nn.Module, *, free: bool = False) -> bool:
        began = time.perf_counter()
        if not self.meter.ticks and self._measured_step is None:
            self._recorder.refuse_going_back(self.clock.step)
        meter = self.meter
        if not free and self.budget and not self.budget.allows(meter.spent_s, meter.last_s, meter.training_s):
            self._skip("budget", f"{self.meter.share:.2%} of training time spent observing")
            return False
        by_method_s: dict[str, float] = {}
        try:
            for name, source in self.sources.ready(self._live, self.buffer.folder("probe_sets"), self._skip):
                rows, weights = self._measure(model, name, source)
                for row in rows:
                    self._recorder.commit(row, name, source, self.clock.now, weights)
                    by_method_s[row.name] = by_method_s.get(row.name, 0.0) + row.cost_s
        finally:
            meter.add(time.perf_counter() - began, by_method_s, budgeted=self.budget is not None)
        if by_method_s:
            self._measured_step = self.clock.step
            self._recorder.log(self.clock.step)
        return bool(by_method_s)

    def _measure(self, model: nn.Module, name: str, source: Source) -> tuple[list[Row], int]:
        if self.subject is None or self.subject.model is not model:
            self.attach(model)
        subject = cast(Subject, self.subject)
        if name not in self._memo or not source.fixed or self._memo[name][0] != source.fingerprint:
            self._memo[name] = (source.fingerprint, {})
        tick = Tick(self.clock.now, self.seed, self._recorder.previous(name, source), self._memo[name][1])
        with subject.view.open(seed=tick.generator("model").initial_seed()):
            return measure(subject, self.methods, source, tick, self._failed), subject.fingerprint()

    def _skip(self, why: str, detail: str) -> None:
        self.buffer.note("skip", step=self.clock.step, frames=self.clock.frames, why=why, detail=detail)

    def _failed(self, row: str, error: Exception) -> None:
        self.buffer.note("error", step=self.clock.step, row=row, error=f"{type(error).__name__}: {error}")
        if self.on_error == "raise":
            raise error
        if self.on_error == "warn":
            warnings.warn(f"measuring {row!r} at step {self.clock.step} failed: {error}", stacklevel=2)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the observer is closed; make a new one (with resume=True to go on in its folder)")


def _opened(
    into: ArtifactBuffer | str | os.PathLike[str], sources: Sources, *, resume: bool, overwrite: bool
) -> ArtifactBuffer:
    buffer = into if isinstance(into, ArtifactBuffer) else ArtifactBuffer(into, resume=resume, overwrite=overwrite)
    try:
        sources.agree_with(buffer)
    except BaseException:
        buffer.close()
        raise
    return buffer
