"""What a callback does in one fit: at each moment it asks what is due, and the processes of the fit do it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from tensordict import TensorDictBase
from torch import nn

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.callbacks.averages import average
from tdhook_train.callbacks.batches import FixedBatch, Inputs, as_tensordict, in_keys
from tdhook_train.callbacks.cadence import by_default
from tdhook_train.callbacks.pictures import show
from tdhook_train.callbacks.ranks import Ranks
from tdhook_train.callbacks.refusals import remove_if_new
from tdhook_train.callbacks.replicas import Replicas
from tdhook_train.callbacks.telling import Telling, Told
from tdhook_train.method import Method
from tdhook_train.observer import Observer
from tdhook_train.observer.agenda import Whens
from tdhook_train.undo import Undo

__all__ = ["Asked", "Watch"]

_Spans = Mapping[str, int | None]  # that are held, and when each ends
_Batch = Callable[[], TensorDictBase]


@dataclass(frozen=True)
class Asked:
    """What a user asked of a callback, as far as it matters in a fit; see :class:`ObserverCallback`."""

    name: str
    methods_for: Callable[[TensorDictBase], Mapping[str, Method | Sequence[Method]]]
    when: Whens | None
    weights: Literal["live", "average"]
    on: FixedBatch
    inputs: Inputs
    dirpath: Any
    limits: Mapping[str, Any]
    log_metrics: bool
    prog_bar: bool
    settings: Mapping[str, Any] = field(default_factory=dict)


class Watch:
    """One fit under observation.

    Args:
        trainer: of the fit.
        asked: of the callback.
    """

    def __init__(self, trainer: Trainer, asked: Asked) -> None:
        self._trainer, self._asked = trainer, asked
        # all processes ask the trainer, which speaks with the others, and the first one's answers count
        when = asked.when or trainer.strategy.broadcast(by_default(trainer))
        folder = trainer.log_dir if asked.dirpath is None else None
        self._folder = Path(asked.dirpath or Path(folder or trainer.default_root_dir) / "tdhook" / asked.name)
        edits = asked.settings.get("edits") or {}
        others = [edit.when for edit in edits.values()]
        self.ranks = Ranks(trainer, when, others)
        triggers = [*(when.values() if isinstance(when, Mapping) else [when]), *others]
        self.by_epoch = any("epochs" in trigger.scales for trigger in triggers)
        self._replicas = Replicas(edits, first=self.ranks.first) if self.ranks.several and edits else None
        self._fixed = self.ranks.of_each(lambda: asked.on.settled(trainer))
        self._telling = Telling(trainer, asked.name, log_metrics=asked.log_metrics, prog_bar=asked.prog_bar)
        self._telling.keeps = self.ranks.several
        self._restored: dict[str, Any] | None = None
        self._resumes = False
        self.observer: Observer | None = None
        self.held = False  # whether edits were held when the checkpoint was made
        self.batches = 0  # trained on
        self.last: Any = None  # batch

    def go_on(self, state: dict[str, Any] | None) -> None:
        """Take the state of a checkpoint; the first process's counts."""
        clock, self.held = self.ranks.of_first(lambda: (state and dict(state["clock"]), bool(state and state["edits"])))
        self._resumes = clock is not None
        if clock is not None:
            self.ranks.clock.load_state_dict(clock)
            self.batches = int(clock["batches"])
        self._restored = state if self.ranks.first else None

    # ------------------------------------------------------------------ a moment

    def step(self, module: LightningModule, batch: Any, epoch: int) -> None:
        """Measure, where that is due.

        Args:
            module: in training.
            batch: of this process.
            epoch: how many are behind.
        """
        self.last, ranks = batch, self.ranks
        if not ranks.several and self.observer is not None:  # as nearly always
            self._measured(self.observer, module, lambda: as_tensordict(batch), epoch)
            return
        if ranks.several and not ranks.due(self.observer, self._trainer.global_step, epoch, self.batches):
            with ranks.alone():  # clocks go on, and spans end
                self._observe(module, lambda: as_tensordict(batch), epoch)
            if self._replicas is not None:
                self._replicas.end(self._trainer.global_step)
            return
        self._together(module, batch, lambda whole: self._observe(module, whole, epoch))

    def hold(self, module: LightningModule, batch: Any) -> None:
        """Hold the edits again that were held when the checkpoint was made."""
        self._together(module, batch, lambda whole: self._known(module, whole).spans)

    def finish(self, *, report: bool) -> None:
        """Measure the last weights, and write the report if that is asked for."""
        if not (self.ranks.begun or not self.ranks.several):
            return
        _ = self._trainer.callback_metrics  # as in _together
        whole = self._whole(self.last)
        self._tell(self.ranks.of_first(lambda: self._finished(whole, report=report)))

    def _together(self, module: LightningModule, batch: Any, do: Callable[[_Batch], _Spans]) -> None:
        """Let the first process do something, and all have what came of it by now: new scalars, and its spans."""
        if self.ranks.several:
            _ = self._trainer.callback_metrics  # what is logged is reduced by all processes, and below alone by none
        whole = self._whole(batch)
        spans, told = self.ranks.of_first(lambda: (do(whole), self._telling.taken()))
        self._tell(told)
        if self._replicas is not None:
            self._replicas.follow(module, self._trainer.optimizers, spans)

    def _whole(self, batch: Any) -> _Batch:
        """Return what gives the batch of all processes: of one alone it is made where it is wanted."""
        if self._fixed is not None:
            fixed = self._fixed.td
            return lambda: fixed
        if not self.ranks.several:
            return lambda: as_tensordict(batch)
        whole = self.ranks.whole(batch)
        return lambda: whole

    def _tell(self, told: list[Told]) -> None:
        if not self.ranks.first:
            for metrics, step in told:
                self._telling.log_metrics(metrics, step)

    # ------------------------------------------------------------------ in the first process

    def _observe(self, module: LightningModule, batch: _Batch, epoch: int) -> _Spans:
        if not self.ranks.first:
            return {}
        if self.observer is not None:
            return self._measured(self.observer, module, batch, epoch)
        with Undo() as undo:  # a measurement that fails at once leaves nothing behind
            remove_if_new(self._folder, undo)
            undo.callback(self._drop)
            spans = self._measured(self._known(module, batch), module, batch, epoch)
            undo.pop_all()
        return spans

    def _measured(self, observer: Observer, module: LightningModule, batch: _Batch, epoch: int) -> _Spans:
        step = self._trainer.global_step
        with self._trainer.precision_plugin.forward_context():
            observer.step(self._model(module), batch, step=step, epoch=epoch, batches=self.batches)
        return observer.spans

    def _finished(self, batch: _Batch, *, report: bool) -> list[Told]:
        if self.observer is None:
            return []
        with self._trainer.precision_plugin.forward_context():
            self.observer.finish(batch, step=self._trainer.global_step)
        if report:
            self._show(self.observer)
        return self._telling.taken()

    def _model(self, module: LightningModule) -> nn.Module:
        return module if self._asked.weights == "live" else average(self._trainer)

    def _known(self, module: LightningModule, batch: _Batch) -> Observer:
        """Return the observer; the first time, open it."""
        if self.observer is None:
            self.observer = self._opened(self._model(module), batch())
        return self.observer

    def _opened(self, model: nn.Module, batch: TensorDictBase) -> Observer:
        settings = dict(self._asked.settings) | ({"resume": True, "overwrite": False} if self._resumes else {})
        into: ArtifactBuffer | Path = self._folder
        if self._asked.limits:
            opening = {name: settings[name] for name in ("resume", "overwrite") if name in settings}
            into = ArtifactBuffer(self._folder, **opening, **self._asked.limits)
        observer = Observer(
            self._asked.methods_for(batch),
            when=self.ranks.when,
            into=into,
            on=self._fixed or "batch",
            loggers=self._telling,
            **settings,
        )
        with Undo() as undo:
            undo.callback(observer.close)
            observer.undo.callback(self._telling.close)
            observer.optimizers[:] = self._trainer.optimizers
            observer.attach(model, in_keys=in_keys(batch, self._asked.inputs))
            if self._restored is not None:
                observer.load_state_dict(self._restored)
                self._restored = None
            undo.pop_all()
        return observer

    def _show(self, observer: Observer) -> None:
        from tdhook_train.plots import write_report  # brings plotly and matplotlib along

        page = write_report(observer.buffer, observer.buffer.path, title=self._asked.name)
        for logger in self._trainer.loggers:
            show(logger, self._asked.name, page.with_suffix(".png"), self._trainer.global_step)

    # ------------------------------------------------------------------ the end

    def state_dict(self) -> dict[str, Any] | None:
        """Return plain values for a checkpoint; None where nothing has begun."""
        if self.observer is None:  # a fit that goes on may be saved before there is something to do
            return self._restored
        with self.ranks.alone():  # it waits for rows from the background, and the others for the checkpoint
            return self.observer.state_dict()
        return None

    def close(self, error: BaseException | None = None) -> None:
        """Let go of everything; after an error without waiting for rows."""
        with Undo() as undo:
            if self._replicas is not None:
                undo.callback(self._replicas.close)
            if self.observer is not None:
                undo.callback(self._drop, error)

    def _drop(self, error: BaseException | None = None) -> None:
        observer, self.observer = self.observer, None
        if observer is not None:
            observer.__exit__(None if error is None else type(error), error, None)
