"""An observer as a callback of Lightning's Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from tensordict import TensorDictBase
from torch import Tensor
from typing_extensions import override

from tdhook_train.buffer.folder import check_name
from tdhook_train.callbacks.averages import in_turn
from tdhook_train.callbacks.batches import FixedBatch, Inputs, as_tensordict, in_keys
from tdhook_train.callbacks.cadence import Moment, trigger
from tdhook_train.callbacks.ranks import refuse_sharded
from tdhook_train.callbacks.refusals import refuse_settings, refuse_words
from tdhook_train.callbacks.telling import NO_NAME, refuse_clashes
from tdhook_train.callbacks.watch import Asked, Watch
from tdhook_train.method import Method
from tdhook_train.observer import Observer
from tdhook_train.observer.measure import rows_of
from tdhook_train.observer.ticks import OnError
from tdhook_train.schedule import Trigger

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
        self._key = self._generate_state_key(name=self.name)  # which Lightning asks for at every hook
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
        self.report = report
        self._asked = Asked(
            self.name,
            self.methods_for,
            self.when,
            weights,
            FixedBatch(batch, dataloader, rows, groups),
            inputs,
            dirpath,
            dict(limits or {}),
            log_metrics,
            prog_bar,
            {"on_error": on_error, **settings},
        )
        self._watch: Watch | None = None  # none outside a fit
        self._restored: dict[str, Any] | None = None
        self._state: dict[str, Any] | None = None  # of the last fit
        self._begun = False

    @property
    @override
    def state_key(self) -> str:
        return self._key

    @property
    def rows(self) -> list[str]:
        """What its rows are called."""
        return [*self.methods, *self._asked.settings.get("edits", ())]

    @property
    def observer(self) -> Observer | None:
        """The observer of the fit, once there is something to observe; in the first process alone."""
        return None if self._watch is None else self._watch.observer

    def methods_for(self, batch: TensorDictBase) -> Mapping[str, Method | Sequence[Method]]:  # noqa: ARG002
        """Say what to measure, once it is known on what."""
        return self.methods

    # ------------------------------------------------------------------ the fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            refuse_sharded(trainer.strategy)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = False
        if getattr(trainer, "fast_dev_run", 0):
            return
        ours = [callback for callback in trainer.callbacks if isinstance(callback, ObserverCallback)]  # type: ignore[attr-defined]
        refuse_clashes((callback.name, callback.rows) for callback in ours)
        trainer.callbacks = in_turn(trainer.callbacks, self, after=self.weights == "average")  # type: ignore[attr-defined]
        self._watch = Watch(trainer, self._asked)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is None:
            return
        if self._restored is None and self._state and self._state["clock"]["step"] == trainer.global_step:
            self._restored = self._state  # the same trainer fits once more
        self._watch.go_on(self._restored)
        self._restored = self._state = None

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
        if self._watch is not None and self.at == "validation":
            self._watch.last = batch

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None and self.at == "validation":
            self._step(trainer, pl_module, self._watch.last)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._watch is None or self._begun:
            return
        self._begun = True
        if self._watch.held:  # the batch that comes is to be trained with them
            self._watch.hold(pl_module, batch)
        elif trainer.global_step == 0 and self.at != "validation":
            self._step(trainer, pl_module, batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._watch is None:
            return
        self._watch.batches += 1
        if self.at != "validation":
            self._step(trainer, pl_module, batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the step is that of the last batch: what goes by the time or by a function would be due at it once more
        if self._watch is not None and self._watch.by_epoch and self.at != "validation":
            self._step(trainer, pl_module, self._watch.last, epoch=trainer.current_epoch + 1)

    def _step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, epoch: int | None = None) -> None:
        if self._watch is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._watch.step(pl_module, batch, trainer.current_epoch if epoch is None else epoch)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            self._warn_of_nothing(trainer, self._watch)
            self._watch.finish(report=self.report)
            self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close(exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._watch is not None:
            self._state = self._watch.state_dict()
            self._watch.close()
            self._watch = None

    def _warn_of_nothing(self, trainer: Trainer, watch: Watch) -> None:
        if trainer.global_step == 0 and watch.batches:
            rank_zero_warn(
                f"{self.name!r}: the trainer counted no optimizer step, so that every row says step 0; it counts those "
                "of self.optimizers(), but not of optimizers that are stepped without it"
            )
        elif watch.observer is None and self.at == "validation" and watch.ranks.first:
            rank_zero_warn(f"{self.name!r} measured nothing: at='validation', but the fit had none")

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        running = None if self._watch is None else self._watch.state_dict()
        return running or self._restored or self._state or {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None
