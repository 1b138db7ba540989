"""An observer as a callback of Lightning's Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from tensordict import TensorDictBase
from torch import Tensor, nn
from typing_extensions import override

from tdhook_train.callbacks.averages import average
from tdhook_train.callbacks.batches import FixedBatch, Inputs, in_keys
from tdhook_train.callbacks.cadence import Moment, by_default, trigger
from tdhook_train.callbacks.pictures import show
from tdhook_train.callbacks.ranks import Ranks, refuse_sharded
from tdhook_train.callbacks.replicas import Replicas
from tdhook_train.errors import did_you_mean
from tdhook_train.method import Method
from tdhook_train.observer import Observer, ProbeSet
from tdhook_train.observer.ticks import OnError
from tdhook_train.schedule import Trigger
from tdhook_train.undo import Undo

__all__ = ["ObserverCallback"]

_Found = tuple[dict[str, float], dict[str, int | None]]  # new scalars, and the edits that are held


class ObserverCallback(Callback):
    """Measures a LightningModule while it is fitted; the fit ends in the same bits as without.

    The live module is measured in place, in evaluation mode and under a guard, after the optimizer step: a row of step
    k has the weights of a checkpoint of step k (``trainer.global_step``). Step 0 is measured before the first batch.

    In several processes (DDP) the first one measures, on the batches of all put together, and tells the others what it
    told the loggers; an error of one ends all. What is due by steps, batches or epochs each knows by itself; by time,
    by a function or by rows, the first is asked at each batch.

    Args:
        methods: what to measure: a method, several, or a mapping of the names of rows to either.
        every_n_train_steps: optimizer steps between measurements, or
        every_n_epochs: epochs between them, or
        train_time_interval: wall time between them, or
        when: any trigger of :mod:`tdhook_train.schedule`. By default step 0 and every 2 % of the fit.
        at: measure after optimizer steps, or at the end of each validation of the fit (then there is no cadence to
            give), on the last batch validated where no other is given.
        weights: which ones: those that are trained, or the running average of a
            :class:`~lightning.pytorch.callbacks.WeightAveraging` callback, under a run's name that ends in
            ``-average``.
        batch: what to measure on, always the same; as the training has it. The batch in training, if None.
        dataloader: takes the first ``rows`` of it for this, before the fit.
        rows: of the probe set that a dataloader gives.
        inputs: the keys of a batch that ``forward`` takes, in order, or a mapping of keys to names of its arguments;
            the first by default. A tuple's parts are ``input``, ``target``, ``2``, …; a mapping keeps its keys.
        groups: of a probe set, which rows belong together: a key of it or a tensor. Without, rows are independent.
        dirpath: folder of the run; by default ``tdhook/<name>`` in the trainer's ``log_dir``.
        log_metrics: tell the trainer's loggers the mean of each key, and put it into ``trainer.callback_metrics``.
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
        log_metrics: bool = True,
        report: bool = False,
        on_error: OnError = "raise",
        name: str = "observer",
        **settings: Any,
    ) -> None:
        super().__init__()
        _refuse_unknown(at=at, weights=weights)
        self.name = name if weights == "live" else f"{name}-average"
        self.at, self.weights = at, weights
        self.methods = dict(methods) if isinstance(methods, Mapping) else {name: methods}
        self.when = trigger(
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            train_time_interval=train_time_interval,
            when=when,
            at=at,
        )
        self.log_metrics, self.report = log_metrics, report
        self._on = FixedBatch(batch, dataloader, rows, groups)
        self._inputs = inputs
        self._dirpath = dirpath
        self._settings = {"on_error": on_error, **settings}
        self.observer: Observer | None = None
        self._fixed: ProbeSet | None = None
        self._ranks: Ranks | None = None  # none outside a fit
        self._replicas: Replicas | None = None  # likewise, and where one process fits alone
        self._folder: Path | None = None
        self._restored: dict[str, Any] | None = None
        self._state: dict[str, Any] | None = None  # of the last fit
        self._resumes = False
        self._last: Any = None  # batch of the training
        self._batches = 0  # trained on
        self._begun = False
        self._held = False  # whether a checkpoint was made while edits were held

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

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
        # all processes ask the trainer, which speaks with the others, and the first one's answers count
        when = self.when or trainer.strategy.broadcast(by_default(trainer))
        folder = trainer.log_dir if self._dirpath is None else None
        self._folder = Path(self._dirpath or Path(folder or trainer.default_root_dir) / "tdhook" / self.name)
        edits = self._settings.get("edits") or {}
        self._ranks = ranks = Ranks(trainer, when, [edit.when for edit in edits.values()])
        self._replicas = Replicas(edits, first=ranks.first) if ranks.several and edits else None
        ranks.of_each(lambda: self._settle(trainer, pl_module))
        if ranks.first:
            self._resumes = self._restored is not None or self._state is not None

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fixed = self._on.settled(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = int(self._restored["clock"]["batches"]) if self._restored else 0
        self._held = bool(self._restored and self._restored["edits"])
        if self._restored and self._ranks is not None:
            self._ranks.clock.load_state_dict(dict(self._restored["clock"]))
            if not self._ranks.first:  # which opens the observer that takes it
                self._restored = None

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
            if self._held:  # the batch that comes is to be trained with them
                self._together(trainer, pl_module, batch, self._go_on)
            elif trainer.global_step == 0 and self.at == "training":
                self._step(trainer, pl_module, batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        if self.at == "training":
            self._step(trainer, pl_module, batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.at == "training":
            self._step(trainer, pl_module, self._last, epoch=trainer.current_epoch + 1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (ranks := self._ranks) is None:
            return
        if ranks.begun or not ranks.several:
            own = self._fixed is not None or not ranks.several  # a process alone has told its observer of the batch
            td = None if own else ranks.whole(self._last)
            self._tell(trainer, ranks.of_first(lambda: self._finish(trainer, td)))
        self._close()

    def _finish(self, trainer: Trainer, td: TensorDictBase | None) -> dict[str, float]:
        if self.observer is None:
            return {}
        with trainer.precision_plugin.forward_context():
            self.observer.finish(td, step=trainer.global_step)
        if self.report:
            self._show(trainer, self.observer)
        return self.observer.scalars

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.observer is not None:
            self.observer.__exit__(type(exception), exception, exception.__traceback__)
        self._let_go()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self.observer is not None:
            self._state = self.observer.state_dict()
            self.observer.close()
        self._let_go()

    def _let_go(self) -> None:
        if self._replicas is not None:
            self._replicas.close()
        self._last = self._ranks = self._replicas = self.observer = None

    # ------------------------------------------------------------------ a moment

    def _step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, epoch: int | None = None) -> None:
        ranks = self._ranks
        if ranks is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._last = batch
        epoch = trainer.current_epoch if epoch is None else epoch
        if ranks.several and not ranks.due(self.observer, trainer.global_step, epoch, self._batches):
            with ranks.alone():  # clocks go on, and spans end
                self._observe(trainer, pl_module, None, epoch)
            if self._replicas is not None:
                self._replicas.end(trainer.global_step)
            return
        self._together(trainer, pl_module, batch, partial(self._observe, epoch=epoch))

    def _together(self, trainer: Trainer, pl_module: LightningModule, batch: Any, do: Callable[..., _Found]) -> None:
        """Let the first process do something, and all have what comes of it: new scalars, and the spans it holds."""
        if (ranks := self._ranks) is None:
            return
        td = None if self._fixed else ranks.whole(batch)
        found, spans = ranks.of_first(lambda: do(trainer, pl_module, td))
        self._tell(trainer, found)
        if self._replicas is not None:
            self._replicas.follow(pl_module, trainer.optimizers, spans)

    def _go_on(self, trainer: Trainer, pl_module: LightningModule, td: TensorDictBase | None) -> _Found:
        return {}, self._known(trainer, pl_module, td)[0].spans

    def _observe(self, trainer: Trainer, pl_module: LightningModule, td: TensorDictBase | None, epoch: int) -> _Found:
        if not trainer.is_global_zero:
            return {}, {}
        observer, model = self._known(trainer, pl_module, td)
        with trainer.precision_plugin.forward_context():
            new = observer.step(model, td, step=trainer.global_step, epoch=epoch, batches=self._batches)
        return observer.scalars if new else {}, observer.spans

    def _known(
        self, trainer: Trainer, pl_module: LightningModule, td: TensorDictBase | None
    ) -> tuple[Observer, nn.Module]:
        model = pl_module if self.weights == "live" else average(trainer)
        if self.observer is None:
            known = td if self._fixed is None else self._fixed.td
            self.observer = self._opened(trainer, model, cast(TensorDictBase, known))
        return self.observer, model

    def methods_for(self, batch: TensorDictBase) -> Mapping[str, Method | Sequence[Method]]:  # noqa: ARG002
        """Say what to measure, once it is known on what."""
        return self.methods

    def _opened(self, trainer: Trainer, model: nn.Module, batch: TensorDictBase) -> Observer:
        observer = Observer(
            self.methods_for(batch),
            when=cast(Ranks, self._ranks).when,
            into=cast(Path, self._folder),
            on=self._fixed or "batch",
            loggers=list(trainer.loggers) if self.log_metrics else (),
            resume=self._resumes,
            **self._settings,
        )
        with Undo() as undo:
            undo.callback(observer.close)
            observer.optimizers[:] = trainer.optimizers
            observer.attach(model, in_keys=in_keys(batch, self._inputs))
            if self._restored is not None:
                observer.load_state_dict(self._restored)
                self._restored = None
            undo.pop_all()
        return observer

    def _tell(self, trainer: Trainer, found: Mapping[str, float]) -> None:
        if self.log_metrics:
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in found.items()})

    def _show(self, trainer: Trainer, observer: Observer) -> None:
        from tdhook_train.plots import write_report  # brings plotly and matplotlib along

        page = write_report(observer.buffer, observer.buffer.path, title=self.name)
        for logger in trainer.loggers:
            show(logger, self.name, page.with_suffix(".png"), trainer.global_step)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.observer is None:
            return self._state or {}
        if self._ranks is not None:
            with self._ranks.alone():  # it waits for rows from the background, and the others for the checkpoint
                return self.observer.state_dict()
        return self.observer.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None


def _refuse_unknown(**given: str) -> None:
    known = {"at": ("training", "validation"), "weights": ("live", "average")}
    for setting, value in given.items():
        if value not in known[setting]:
            raise MisconfigurationException(f"{setting}={value!r}{did_you_mean(str(value), known[setting])}")
