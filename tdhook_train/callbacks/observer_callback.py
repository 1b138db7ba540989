"""An observer as a callback of Lightning's Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from tensordict import TensorDictBase
from torch import Tensor, nn
from typing_extensions import override

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.buffer.folder import check_name
from tdhook_train.callbacks.averages import average, in_turn
from tdhook_train.callbacks.batches import FixedBatch, Inputs, as_tensordict, in_keys
from tdhook_train.callbacks.cadence import Moment, by_default, trigger
from tdhook_train.callbacks.pictures import show
from tdhook_train.callbacks.ranks import Ranks
from tdhook_train.callbacks.refusals import refuse_settings, refuse_words, remove_if_new
from tdhook_train.callbacks.telling import NO_NAME, Telling, refuse_clashes
from tdhook_train.method import Method
from tdhook_train.observer import Observer, ProbeSet
from tdhook_train.observer.measure import rows_of
from tdhook_train.observer.ticks import OnError
from tdhook_train.schedule import Trigger
from tdhook_train.undo import Undo

__all__ = ["ObserverCallback"]


class ObserverCallback(Callback):
    """Measures a LightningModule while it is fitted; the fit ends in the same bits as without.

    The live module is measured in place, in evaluation mode and under a guard, after the optimizer step: a row of step
    k has the weights of a checkpoint of step k (``trainer.global_step``). Step 0 is measured before the first batch.

    Args:
        methods: what to measure: a method, several, or a mapping of the names of rows to either.
        every_n_train_steps: optimizer steps between measurements, or
        every_n_epochs: epochs between them, or
        train_time_interval: wall time between them, or
        when: any trigger of :mod:`tdhook_train.schedule`. By default step 0 and every 2 % of the fit.
        at: measure after optimizer steps; or at the end of each ``"validation"`` of the fit, on the last batch
            validated where no other is given; or only at the ``"end"`` of the training. The last two take no cadence.
            The weights at the end of the training are measured in any case.
        weights: which ones: those that are trained, or the running average of a
            :class:`~lightning.pytorch.callbacks.WeightAveraging` callback, under a run's name that ends in
            ``-average``. The callback moves behind that one in ``trainer.callbacks``, or before it to measure those
            that are trained, which it replaces at the end.
        batch: what to measure on, always the same; as the training has it. The batch in training, if None.
        dataloader: takes the first ``rows`` of it for this, before the fit.
        rows: of the probe set that a dataloader gives.
        inputs: the keys of a batch that ``forward`` takes, in order, or a mapping of keys to names of its arguments;
            the first by default. A tuple's parts are ``input``, ``target``, ``2``, …; a mapping keeps its keys; what is
            nested is written with dots, ``a.input``.
        groups: of a probe set, which rows belong together: a key of it or a tensor. Without, rows are independent.
        dirpath: folder of the run; by default ``tdhook/<name>`` in the trainer's ``log_dir``.
        limits: of what the run keeps: ``capacity``, ``max_bytes`` and ``keep`` of
            :class:`~tdhook_train.ArtifactBuffer`; everything is kept by default.
        log_metrics: tell the trainer's loggers the mean of each key, and put it into ``trainer.callback_metrics``,
            where ``ModelCheckpoint(monitor=...)`` finds it. ``rank/effective_rank`` is that key of the row ``rank``;
            with a ``name`` of the callback's own, ``name/rank/effective_rank``. MLflow gets ``_`` for what it refuses.
        prog_bar: show the first of these in the progress bar: ``name: r2/target 0.93 (step 40)``.
        report: write the report of the run, a page and a picture, at the end of the fit, and give the picture to the
            loggers that take one; needs the ``plots`` extra.
        on_error: an error of a method stops the fit, warns, or is only recorded.
        name: of the run's folder and, with two of these callbacks, what tells their checkpoints apart.
        settings: further ones of :class:`~tdhook_train.observer.Observer`: ``budget``, ``seed``, ``edits``, …

    Raises:
        MisconfigurationException: more than one cadence, or both a batch and a dataloader.
    """

    def __init__(  # noqa: PLR0913 - what users of Lightning's callbacks expect
        self,
        methods: Method | Sequence[Method] | Mapping[str, Method | Sequence[Method]],
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        when: Trigger | None = None,
        at: Moment = "training",
        weights: Literal["live", "average"] = "live",
        batch: Any = None,
        dataloader: Iterable[Any] | None = None,
        rows: int = 2048,
        inputs: Inputs = None,
        groups: str | Tensor | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        limits: Mapping[str, Any] | None = None,
        log_metrics: bool = True,
        prog_bar: bool = True,
        report: bool = False,
        on_error: OnError = "raise",
        name: str = NO_NAME,
        **settings: Any,
    ) -> None:
        super().__init__()
        refuse_words(at=at, weights=weights, on_error=on_error)
        refuse_settings(type(self), settings, limits or {})
        check_name(name)
        self.name = name if weights == "live" else f"{name}-average"
        self.at, self.weights = at, weights
        self.methods = dict(methods) if isinstance(methods, Mapping) else {name: methods}
        rows_of(self.methods, none=bool(settings.get("edits")))
        if batch is not None:
            in_keys(as_tensordict(batch), inputs)
        self.when = trigger(
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            train_time_interval=train_time_interval,
            when=when,
            at=at,
        )
        self.log_metrics, self.prog_bar, self.report = log_metrics, prog_bar, report
        self._on = FixedBatch(batch, dataloader, rows, groups)
        self._inputs = inputs
        self._dirpath, self._limits = dirpath, dict(limits or {})
        self._settings = {"on_error": on_error, **settings}
        self.observer: Observer | None = None
        self._fixed: ProbeSet | None = None
        self._ranks: Ranks | None = None  # none outside a fit
        self._restored: dict[str, Any] | None = None
        self._state: dict[str, Any] | None = None  # of the last fit
        self._goes_on = False
        self._last: Any = None  # batch of the training
        self._batches = 0  # trained on
        self._begun = False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @property
    def rows(self) -> list[str]:
        """What its rows are called."""
        return [*self.methods, *self._settings.get("edits", ())]

    # ------------------------------------------------------------------ the fit

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = False
        if getattr(trainer, "fast_dev_run", 0):
            return
        ours = [callback for callback in trainer.callbacks if isinstance(callback, ObserverCallback)]  # type: ignore[attr-defined]
        refuse_clashes((callback.name, callback.rows) for callback in ours)
        trainer.callbacks = in_turn(trainer.callbacks, self, after=self.weights == "average")  # type: ignore[attr-defined]
        self._ranks = Ranks(trainer, self.when or by_default(trainer))
        self._fixed = self._on.settled(trainer)

    def _folder(self, trainer: Trainer) -> Path:
        if self._dirpath is not None:
            return Path(self._dirpath)
        return Path(trainer.log_dir or trainer.default_root_dir) / "tdhook" / self.name

    def _into(self, trainer: Trainer) -> ArtifactBuffer | Path:
        folder, settings = self._folder(trainer), self._settings_now()
        opened = {name: settings[name] for name in ("resume", "overwrite") if name in settings}
        return ArtifactBuffer(folder, **opened, **self._limits) if self._limits else folder

    def _settings_now(self) -> dict[str, Any]:
        return self._settings | ({"resume": True, "overwrite": False} if self._goes_on else {})

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is None and self._state and self._state["clock"]["step"] == trainer.global_step:
            self._restored = self._state  # the same trainer fits once more
        self._state = None
        self._goes_on = self._restored is not None
        self._batches = int(self._restored["clock"]["batches"]) if self._restored else 0

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.at == "validation":
            self._last = batch

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.at == "validation":
            self._step(trainer, pl_module, self._last)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._begun:
            self._begun = True
            if trainer.global_step == 0 and self.at != "validation":
                self._step(trainer, pl_module, batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        if self.at != "validation":
            self._step(trainer, pl_module, batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.at != "validation":
            self._step(trainer, pl_module, self._last, epoch=trainer.current_epoch + 1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ranks is None:
            return
        self._warn_of_nothing(trainer)
        _ = trainer.callback_metrics  # as in _step
        with self._ranks.together():
            if self.observer is not None:
                with trainer.precision_plugin.forward_context():
                    self.observer.finish(step=trainer.global_step)
                if self.report:
                    self._show(trainer, self.observer)
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.observer is not None:
            self.observer.__exit__(type(exception), exception, exception.__traceback__)
        self._last = self._ranks = self.observer = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _warn_of_nothing(self, trainer: Trainer) -> None:
        if trainer.global_step == 0 and self._batches:
            rank_zero_warn(
                f"{self.name!r}: the trainer counted no optimizer step, so that every row says step 0; it counts those "
                "of self.optimizers(), but not of optimizers that are stepped without it"
            )
        elif self.observer is None and self.at == "validation" and trainer.is_global_zero:
            rank_zero_warn(f"{self.name!r} measured nothing: at='validation', but the fit had none")

    def _close(self) -> None:
        if self.observer is not None:
            self._state = self.observer.state_dict()
            self.observer.close()
        self._last = self._ranks = self.observer = None

    # ------------------------------------------------------------------ a moment

    def _step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, epoch: int | None = None) -> None:
        ranks = self._ranks
        if ranks is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._last = batch
        epoch = trainer.current_epoch if epoch is None else epoch
        if not ranks.due(trainer.global_step, epoch, self._batches):
            self._observe(trainer, pl_module, lambda: as_tensordict(batch), epoch)
            return
        _ = trainer.callback_metrics  # what is logged is reduced by all ranks, and here alone by none
        with ranks.together():
            whole = None if self._fixed else ranks.whole(as_tensordict(batch))
            self._observe(trainer, pl_module, lambda: cast(TensorDictBase, whole), epoch)

    def _observe(
        self, trainer: Trainer, pl_module: LightningModule, batch: Callable[[], TensorDictBase], epoch: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        model = pl_module if self.weights == "live" else average(trainer)
        if self.observer is not None:
            self._measure(self.observer, trainer, model, batch, epoch)
            return
        with Undo() as undo:  # a measurement that fails at once leaves nothing behind
            remove_if_new(self._folder(trainer), undo)
            self.observer = self._opened(trainer, model, batch() if self._fixed is None else self._fixed.td)
            undo.callback(self._drop)
            self._measure(self.observer, trainer, model, batch, epoch)
            undo.pop_all()

    def _measure(
        self,
        observer: Observer,
        trainer: Trainer,
        model: nn.Module,
        batch: Callable[[], TensorDictBase],
        epoch: int,
    ) -> None:
        with trainer.precision_plugin.forward_context():
            observer.step(model, batch, step=trainer.global_step, epoch=epoch, batches=self._batches)

    def _drop(self) -> None:
        observer, self.observer = self.observer, None
        if observer is not None:
            observer.close()

    def methods_for(self, batch: TensorDictBase) -> Mapping[str, Method | Sequence[Method]]:  # noqa: ARG002
        """Say what to measure, once it is known on what."""
        return self.methods

    def _opened(self, trainer: Trainer, model: nn.Module, batch: TensorDictBase) -> Observer:
        telling = Telling(trainer, self.name, log_metrics=self.log_metrics, prog_bar=self.prog_bar)
        observer = Observer(
            self.methods_for(batch),
            when=cast(Ranks, self._ranks).when,
            into=self._into(trainer),
            on=self._fixed or "batch",
            loggers=telling,
            **self._settings_now(),
        )
        with Undo() as undo:
            undo.callback(observer.close)
            observer.undo.callback(telling.close)
            observer.optimizers[:] = trainer.optimizers
            observer.attach(model, in_keys=in_keys(batch, self._inputs))
            if self._restored is not None:
                observer.load_state_dict(self._restored)
                self._restored = None
            undo.pop_all()
        return observer

    def _show(self, trainer: Trainer, observer: Observer) -> None:
        from tdhook_train.plots import write_report  # brings plotly and matplotlib along

        page = write_report(observer.buffer, observer.buffer.path, title=self.name)
        for logger in trainer.loggers:
            show(logger, self.name, page.with_suffix(".png"), trainer.global_step)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.observer is None:  # a fit that goes on may be saved before there is something to do
            return self._restored or self._state or {}
        return self.observer.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None
