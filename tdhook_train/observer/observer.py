"""The observer: when due, it measures a model in isolation and commits the rows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import (
    ClosedError,
    SettingsError,
    did_you_mean,
)
from tdhook_train.method import Method
from tdhook_train.observer.agenda import Agenda, Whens
from tdhook_train.observer.edits import Edits
from tdhook_train.observer.live_edit import LiveEdit
from tdhook_train.observer.measure import rows_of
from tdhook_train.observer.meter import Meter
from tdhook_train.observer.recorder import Recorder
from tdhook_train.observer.rounds import Rounds
from tdhook_train.observer.sources import Given, On, Sources
from tdhook_train.observer.station import Station
from tdhook_train.observer.subject import Subject
from tdhook_train.observer.ticks import OnError, Ticks
from tdhook_train.observer.trajectories import copied
from tdhook_train.schedule import Budget, Trigger
from tdhook_train.undo import Undo

__all__ = ["Observer"]

_WAITING = 8  # snapshots, in the background


class Observer:
    """Runs methods on a model in training, when due, and commits one row a method.

    The training ends in the same bits as without: networks are measured in isolation, and what a method draws comes
    from a generator of its own, seeded by (seed, step).

    Args:
        methods: what to measure, by the name of its rows; several methods in a list share a row.
        when: which moments, for all rows or for each by name; see :mod:`tdhook_train.schedule`.
        into: an :class:`~tdhook_train.buffer.ArtifactBuffer`, or the folder to make one in.
        on: ``"batch"`` (the one the training is about to use), ``"collected"`` (the last one that :meth:`collected`
            was told of, in the order of time), a :class:`~tdhook_train.observer.ProbeSet`, or several of these by name;
            rows of ``{"first": ...}`` are then named ``probe.first``.
        budget: share of wall time that observing may take; ticks past it are skipped and the skip is recorded.
        seed: of what methods draw.
        on_error: an error of a method stops the training (``"raise"``), warns (``"warn"``) or is only recorded
            (``"skip"``); in no case is a row half written.
        loggers: TorchRL's or Lightning's, one or several, which are told the means of floating-point keys, for each
            network and target: ``probe/r2/actor_network/action``.
        edits: changes of the live network itself, by the names of their rows: see
            :class:`~tdhook_train.observer.LiveEdit`. Without any the training is left as it was.
        background: measure snapshots in a process of its own while the training goes on: the same numbers, but rows
            come later, and what is due when that many snapshots wait (8, if True) is skipped, which is noted.
            Weights and buffers are sent each time, whatever else a module holds (a Python number that is annealed, say)
            but once.
            It pays where a core is free: small networks train as fast with ``torch.set_num_threads(1)``, and leave one.
            An error of a method is raised by a later :meth:`step`. :meth:`finish`, :meth:`state_dict` and
            :meth:`close` wait for what is under way.
        resume: go on in a folder that already holds a run.
        overwrite: replace the run in that folder.

    Attributes:
        buffer: what was measured, an :class:`~tdhook_train.buffer.ArtifactBuffer`; ``buffer["probe"]`` are its rows.
        clock: where the training is; ``clock.frames`` and ``clock.epoch`` are yours to set.

    Raises:
        RunExistsError: the folder already holds a run.
        SettingsError: nothing to measure, or something that is no method.

    Example:
        >>> from tdhook_train import Every
        >>> from tdhook_train.latent import RidgeProbe
        >>> probe = RidgeProbe(target="y")
        >>> with Observer({"probe": probe}, when=Every(optim_steps=100), into="runs/one") as observer:
        ...     for step in range(201):  # of a loop of your own; a TorchRL loss is observed by ObservedLoss
        ...         measured = observer.step(model, td, step=step)
        >>> observer.buffer["probe"].steps
        tensor([100, 200])
    """

    def __init__(  # noqa: PLR0913 - the one place where a user says everything
        self,
        methods: Mapping[str, Method | Sequence[Method]],
        *,
        when: Whens,
        into: ArtifactBuffer | str | os.PathLike[str],
        on: On = "batch",
        budget: Budget | None = None,
        seed: int = 0,
        on_error: OnError = "raise",
        loggers: Any = (),
        edits: Mapping[str, LiveEdit] | None = None,
        background: bool | int = False,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.methods = rows_of(methods, none=bool(edits))
        if on_error not in ("raise", "warn", "skip"):
            raise SettingsError(f"on_error={on_error!r}{did_you_mean(on_error, ('raise', 'warn', 'skip'))}")
        if budget is not None and not isinstance(budget, Budget):
            raise SettingsError(f"budget={budget!r} is no Budget; e.g. budget=Budget(overhead=0.05)")
        if not isinstance(background, int) or background < 0:
            raise SettingsError(f"background={background!r} is neither True, False nor how many snapshots may wait")
        waiting = _WAITING if background is True else int(background)
        sources = Sources(on)
        agenda = Agenda(when, self.methods, sources.names)
        self.buffer = (
            into if isinstance(into, ArtifactBuffer) else ArtifactBuffer(into, resume=resume, overwrite=overwrite)
        )
        with Undo() as undo:
            undo.callback(self.buffer.close)
            sources.agree_with(self.buffer)
            recorder = Recorder(self.buffer, self.methods, loggers)
            ticks = Ticks(Station(self.methods, seed), sources, recorder, budget, on_error)
            self._rounds = Rounds(agenda, ticks, Edits(edits or {}, agenda, recorder, seed), waiting)
            undo.pop_all()  # from here on it is for close() to let go of the buffer
        self._ticks = ticks
        self.clock = ticks.clock
        self.steps_taken: int | None = None  # optimizer steps so far, where a front door counts them
        self.undo = Undo()  # what front doors put on models and optimizers, taken off by close()
        self._paused = 0
        self._closed = False

    # ------------------------------------------------------------------ what is observed

    def attach(
        self,
        model: nn.Module,
        *,
        in_keys: Sequence[NestedKey] | Mapping[Any, str] | None = None,
        out_keys: list[str] | None = None,
    ) -> None:
        """Begin to observe a model: check what can be checked now, and remember its weights as the initial ones.

        Called by the first :meth:`step` where nobody called it before; front doors call it when they are made.

        Raises:
            PathError: a layer pattern that matches no module.
            NetworkError: the model holds no network, or ``networks=`` names none, or another model is observed.
        """
        self._check_open()
        self._rounds.attach(Subject(model, in_keys, out_keys))

    @property
    def subject(self) -> Subject | None:
        """The model that is observed, once there is one."""
        return self._rounds.subject

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the weights that live edits may write; front doors add theirs."""
        return self._rounds.optimizers

    # ------------------------------------------------------------------ as training goes on

    def step(
        self,
        model: nn.Module,
        batch: Given = None,
        *,
        step: int | None = None,
        frames: int | None = None,
        epoch: int | None = None,
        batches: int | None = None,
    ) -> bool:
        """Say where the training is, and measure where that is due.

        Args:
            model: the loss or module in training.
            batch: what it is about to train on, or a function that gives it, called only where something is due; needed
                for ``on="batch"``.
            step: optimizer steps behind the present weights; one more than the last time where it is not given.
            frames: environment frames so far, where they have changed.
            epoch: likewise.
            batches: trained on so far; one more than the last time where it is not given.

        Returns:
            Whether rows were committed; in the background, whether they will be.
        """
        clock = self.clock
        clock.step = step if step is not None else clock.step + (clock.before is not None)
        clock.frames = clock.frames if frames is None else frames
        clock.epoch = clock.epoch if epoch is None else epoch
        clock.batches = clock.batches + 1 if batches is None else batches
        clock.seconds = self.meter.elapsed_s
        self._ticks.live["batch"] = batch if self._ticks.sources.wants("batch") else None
        self._ticks.take()
        if self._closed:
            clock.passed()
            return False
        self._ticks.sources.refresh(clock)
        if self._paused:
            self._rounds.keep(model)
            clock.passed()
            return False
        return self._rounds.go(model)

    def collected(self, batch: TensorDictBase, *, frames: int | None = None) -> None:
        """Say what was just collected: what ``on="collected"`` is measured on, and how far the frames are.

        Args:
            batch: as a collector gives it, ``[time]`` or ``[environments, time]``; copied where it is measured on.
            frames: environment frames so far; as many more as the batch holds, if None.
        """
        self.clock.frames = self.clock.frames + batch.numel() if frames is None else frames
        if self._ticks.sources.wants("collected"):
            self._ticks.live["collected"] = copied(batch)

    def count_steps(self) -> None:
        """Begin to count optimizer steps, from the present one on, unless they are counted already."""
        if self.steps_taken is None:  # else the observer goes on from a checkpoint
            self.steps_taken = self.clock.step

    def count_step(self, *_: Any) -> None:
        """Count one optimizer step."""
        self.steps_taken = (self.steps_taken or 0) + 1

    def finish(self, batch: Given = None, *, step: int | None = None) -> bool:
        """Measure the last weights, unless they have been measured.

        Args:
            batch: what ``on="batch"`` is measured on; the one of the last :meth:`step`, if None.
            step: optimizer steps behind them; known without it where a front door counts steps.
        """
        if self._closed:
            warnings.warn(
                "the observer is closed: call finish() before close() to measure the last weights", stacklevel=2
            )
        if self._closed or self.subject is None:
            return False
        for source in self._ticks.sources.unready():
            said = "it never became complete; ask for fewer frames, or give it a collector"
            warnings.warn(f"nothing was measured on {source!r}: {said}", stacklevel=2)
        counted = self.clock.step if self.steps_taken is None else self.steps_taken
        self.clock.step = counted if step is None else step
        self.clock.seconds = self.meter.elapsed_s
        if batch is not None and self._ticks.sources.wants("batch"):
            self._ticks.live["batch"] = batch
        return self._rounds.finish(self.subject.model)

    def alert(self, when: Trigger, *, mark: str | None = None, call: Callable[[Observer], None] | None = None) -> None:
        """Put a mark on the time axis, or call a function, whenever a trigger is due.

        ``observer.alert(When("health", "dormant", above=0.3), mark="units fall asleep")``

        Args:
            when: a trigger.
            mark: its label.
            call: called with the observer.

        Raises:
            SettingsError: neither a label nor a function, or a trigger that goes by a row that is not measured.
        """
        if mark is None and call is None:
            raise SettingsError('an alert puts a mark or calls: observer.alert(trigger, mark="...") or call=function')

        def tell() -> None:
            if mark is not None:
                self.mark(mark)
            if call is not None:
                call(self)

        self._rounds.agenda.alert(when, tell)

    @property
    def meter(self) -> Meter:
        """What observing costs."""
        return self._ticks.meter

    @property
    def spans(self) -> dict[str, int | None]:
        """The live edits that are held, and the step at which each ends."""
        return self._rounds.spans

    @property
    def scalars(self) -> dict[str, float]:
        """What loggers were told last, by ``row/key``."""
        return dict(self._ticks.recorder.scalars)

    def mark(self, label: str) -> None:
        """Put an event on every time axis, e.g. ``observer.mark("learning rate drop")``."""
        self._check_open()
        self.buffer.note("mark", step=self.clock.step, frames=self.clock.frames, label=label)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Measure nothing and begin no edit inside the block; clocks go on, and spans end when they are over."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def close(self) -> None:
        """Take off every hook, wait for rows from the background, and let go of the model and the buffer.

        Safe to call twice.
        """
        if not self._closed:
            try:
                self._ticks.take(wait=True)
                self._rounds.tell()
            finally:
                if not self._closed:  # by an alert
                    self._let_go()

    def _let_go(self) -> None:
        self._closed = True
        with ExitStack() as each:  # all of them, whatever one of them raises
            each.callback(self.buffer.close)
            each.callback(self.undo.close)
            each.callback(self._rounds.close)

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self._closed:  # whoever interrupts a training does not wait for rows
            self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint of the training."""
        self._ticks.take(wait=True)
        probe_sets = self._ticks.sources.state_dict(self.buffer.folder("probe_sets"))
        known = {"clock": self.clock.state_dict(), "steps_taken": self.steps_taken, "probe_sets": probe_sets}
        return known | self._rounds.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: rows of later steps are dropped, passed boundaries do not fire again."""
        self._check_open()
        self.clock.load_state_dict(dict(state["clock"]))
        self._rounds.load_state_dict(state)
        self.steps_taken = state["steps_taken"]
        self._ticks.take(wait=True)
        self._ticks.sources.load_state_dict(state["probe_sets"], self.buffer.folder("probe_sets"))
        self.buffer.truncate(after_step=self.clock.step)
        self._ticks.go_back()
        self._rounds.remember(state["fresh"])

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the observer is closed; make a new one (with resume=True to go on in its folder)")
