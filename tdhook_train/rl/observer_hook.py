"""An observer as a hook of TorchRL's own Trainer."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torchrl.trainers import Trainer, TrainerHookBase

from tdhook_train.errors import NetworkError, SettingsError
from tdhook_train.observer import Observer

__all__ = ["ObserverHook"]


class ObserverHook(TrainerHookBase):
    """Observes the loss of a :class:`torchrl.trainers.Trainer`, whatever its loop calls of it.

    It measures before each optimization step and counts the steps itself: a trainer that calls ``actor_loss`` and
    ``value_loss`` apart, or has an ``OptimizationStepper``, is observed as any other. Frames come from the trainer,
    ``on="collected"`` is its last batch, and after its loop the last weights are measured. The observer's state is
    saved and restored with the trainer's.

    The scalars of the last tick go to the trainer's logger, after each batch whose frames pass its ``log_interval``.

    Args:
        observer: what to measure, when, and where to keep it.
        log_pbar: show them in the trainer's progress bar as well.

    Example:
        >>> ObserverHook(observer).register(trainer)
    """

    def __init__(self, observer: Observer, *, log_pbar: bool = False) -> None:
        self.observer = observer
        self.log_pbar = log_pbar
        self._trainer: Trainer | None = None

    def register(self, trainer: Trainer, name: str = "observer") -> None:
        """Put the hook on a trainer.

        Args:
            trainer: of TorchRL, running in this process.
            name: under which its state is saved.

        Raises:
            SettingsError: it is on a trainer already.
            NetworkError: the trainer's loss has no networks to observe.
        """
        if self._trainer is not None:
            raise SettingsError("this hook is on a trainer already; make one more observer and hook for another")
        if not isinstance(trainer, Trainer):
            raise NetworkError(f"expected a TorchRL Trainer, got {type(trainer).__name__}")
        self.observer.attach(trainer.loss_module)
        self.observer.count_steps()
        if trainer.optimizer is not None:
            self.observer.optimizers.append(trainer.optimizer)
        trainer.register_op("batch_process", self._collected)
        trainer.register_op("process_optim_batch", self._measure)
        trainer.register_op("post_optim", self.observer.count_step)
        trainer.register_op("post_steps_log", self._log)
        trainer.register_op("shutdown", self._finish)
        trainer.register_module(name, self)
        self._trainer = trainer

    def _collected(self, batch: TensorDictBase) -> TensorDictBase:
        self.observer.collected(batch, frames=self._frames() + batch.numel())
        return batch

    def _measure(self, batch: TensorDictBase) -> TensorDictBase:
        assert self._trainer is not None
        observer = self.observer
        observer.step(self._trainer.loss_module, batch, step=observer.steps_taken, frames=self._frames())
        return batch

    def _log(self, _: TensorDictBase | None) -> dict[str, Any] | None:
        found = self.observer.scalars
        return found | {"log_pbar": self.log_pbar} if found else None

    def _finish(self) -> None:
        if self.observer.subject is not None:  # else it was closed on the way, which is no fault
            self.observer.finish()

    def _frames(self) -> int:
        return 0 if self._trainer is None else int(self._trainer.collected_frames)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the observer is."""
        return self.observer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint: rows of later steps are dropped."""
        self.observer.load_state_dict(state_dict)
