"""Several processes that fit one model: they decide together, the first measures, and an error is everybody's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from tensordict import TensorDict, TensorDictBase

from tdhook_train.errors import WorkerError
from tdhook_train.schedule import Clock, Trigger

__all__ = ["Ranks"]

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


class Ranks:
    """The processes of a fit; one alone talks to nobody.

    All ask the same trigger of the same clock, so that all know when there is something to do together.

    Args:
        trainer: of the fit.
        when: what decides when to measure.

    Raises:
        MisconfigurationException: the model's weights are spread over the processes.
    """

    def __init__(self, trainer: Trainer, when: Trigger) -> None:
        self._strategy: Strategy = trainer.strategy
        if (name := type(trainer.strategy).__name__) in _SHARDED:
            raise MisconfigurationException(
                f"{name} spreads weights over processes, none of which has the whole model to measure; "
                "use DDP, or measure checkpoints after the fit"
            )
        self.when = when
        self._clock, self._began = Clock(), time.monotonic()
        self._world = trainer.world_size
        self.several = self._world > 1
        self.first = trainer.is_global_zero

    def due(self, step: int, epoch: int, batches: int) -> bool:
        """Whether there is something to do together now: to begin, or to measure."""
        if not self.several:
            return False
        clock = self._clock
        begins = clock.before is None
        clock.step, clock.epoch, clock.batches = step, epoch, batches
        clock.seconds = time.monotonic() - self._began
        due = self.when.due(clock)
        clock.asked()
        return begins or (due if self.when.everywhere else bool(self._strategy.broadcast(due)))

    def whole(self, part: TensorDictBase) -> TensorDictBase:
        """Put the parts of a batch together in the order of one process: rows are dealt out in turn."""
        parts: list[TensorDict] = [TensorDict() for _ in range(self._world)]
        torch.distributed.all_gather_object(parts, part.cpu())
        if len({len(one) for one in parts}) > 1:
            return torch.cat(parts).to(part.device)
        return torch.stack(parts, 1).flatten(0, 1).to(part.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error of the first process be everybody's: else the others would wait for it for ever."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # whatever a method raises, after all have been told
            error = raised
        said = self._strategy.broadcast(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if said is not None:
            raise WorkerError(f"measuring failed on rank 0: {said}")
