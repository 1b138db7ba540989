"""Several processes that fit one model: they decide together, the first measures, and an error is everybody's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from tensordict import TensorDict

from tdhook_train.callbacks.batches import as_tensordict
from tdhook_train.errors import SettingsError, WorkerError
from tdhook_train.observer import Observer
from tdhook_train.observer.agenda import Whens
from tdhook_train.schedule import Clock, Trigger

__all__ = ["Ranks", "Said", "refuse_sharded"]

T = TypeVar("T")

_SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"}


def refuse_sharded(strategy: Strategy) -> None:
    """Refuse a strategy under which no process has the whole model.

    Raises:
        MisconfigurationException: the model's weights are spread over the processes.
    """
    if _SHARDED & {kind.__name__ for kind in type(strategy).__mro__}:
        raise MisconfigurationException(
            f"{type(strategy).__name__} spreads weights over processes, none of which has the whole model to measure; "
            "use DDP, or measure checkpoints after the fit"
        )


class Said(Trigger):
    """A trigger that the processes of a fit have asked together; the observer is told what they found.

    Args:
        asked: the trigger.
    """

    def __init__(self, asked: Trigger) -> None:
        self.asked = asked
        self.now = False

    @property
    def rows(self) -> frozenset[str]:
        """Those of the trigger."""
        return self.asked.rows

    @property
    def scales(self) -> frozenset[str]:
        """Those of the trigger."""
        return self.asked.scales

    def due(self, clock: Clock) -> bool:  # noqa: ARG002 - the trigger was asked of it
        """Say what was found."""
        return self.now


class Ranks:
    """The processes of a fit; one alone talks to nobody.

    They come together at their first moment and whenever something is due: where the trigger goes by steps, batches and
    epochs alone each knows by itself when that is; else the first process is asked at each moment. What it does then,
    and an error of it, all are told.

    Args:
        trainer: of the fit.
        when: what decides when to measure, for all rows or for each by name.
        others: what else has to happen together.
    """

    def __init__(self, trainer: Trainer, when: Whens, others: list[Trigger]) -> None:
        self._strategy: Strategy = trainer.strategy
        self._world = trainer.world_size
        self.several = self._world > 1
        self.first = trainer.is_global_zero
        each = when if isinstance(when, Mapping) else {"": when}
        self._said = {row: Said(trigger) for row, trigger in each.items()}
        said: Whens = self._said if isinstance(when, Mapping) else self._said[""]
        self.when = said if self.several else when
        self._others = others
        self.clock = Clock()
        self.begun = False
        self._kept: Exception | None = None

    def due(self, observer: Observer | None, step: int, epoch: int, batches: int) -> bool:
        """Whether there is something to do together now: to begin, to measure, or to change the model.

        Args:
            observer: of this process, if it has one by now: it alone knows what was measured.
            step: optimizer steps behind the present weights.
            epoch: of the training.
            batches: trained on so far.
        """
        clock, begins, self.begun = self.clock, not self.begun, True
        clock.step, clock.epoch, clock.batches = step, epoch, batches
        if observer is not None:
            clock.seconds = observer.meter.elapsed_s
            clock.known, clock.fresh = observer.clock.known, observer.clock.fresh
        for said in self._said.values():
            ask = partial(said.asked.due, clock)
            said.now = ask() if said.asked.everywhere else self.of_first(ask)
        # what goes by rows or by seconds, which the first process alone knows, may happen at any moment
        others = any(not other.everywhere or other.due(clock) for other in self._others)
        clock.passed()
        return begins or others or any(said.now for said in self._said.values())

    def whole(self, batch: Any) -> TensorDict:
        """Put the parts of a batch together in the order of one process: rows are dealt out in turn.

        Raises:
            SettingsError: the parts do not go together.
            WorkerError: another process could not read its part.
        """
        if not self.several:
            return as_tensordict(batch)
        part: list[TensorDict] = []
        self.of_each(lambda: part.append(as_tensordict(batch)))
        parts: list[TensorDict] = [TensorDict() for _ in range(self._world)]
        torch.distributed.all_gather_object(parts, part[0].detach().cpu())
        shapes = [{str(key): tuple(value.shape[1:]) for key, value in one.items(True, True)} for one in parts]
        if any(other != shapes[0] for other in shapes):
            said = "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(shapes))
            raise SettingsError(
                f"the processes' batches do not go together, their rows are {said}; give batch= or dataloader="
            )
        if len({len(one) for one in parts}) > 1:
            return torch.cat(parts).to(part[0].device)
        return torch.stack(parts, 1).flatten(0, 1).to(part[0].device)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep an error of a moment at which nobody listens until all come together."""
        try:
            yield
        except Exception as error:  # whatever a method raised in the background, or a disk
            if not self.several:
                raise
            self._kept = self._kept or error

    def of_first(self, do: Callable[[], T]) -> T:
        """Do something on the first process, and tell all what came of it: else the others would wait for ever.

        Raises:
            WorkerError: it failed, on another process; there its own error is raised.
        """
        if not self.several:
            return do()
        found, error = None, None
        if self.first:
            found, error = self._tried(do)
        found, said = self._strategy.broadcast((found, _text(error)))
        if error is not None:
            raise error
        if said is not None:
            raise WorkerError(f"measuring failed on rank 0: {said}")
        return found  # type: ignore[return-value]

    def of_each(self, do: Callable[[], T]) -> T:
        """Do something on every process; where it fails on one, none goes on.

        Raises:
            WorkerError: it failed, on another process; there its own error is raised.
        """
        if not self.several:
            return do()
        found, error = self._tried(do)
        said: list[str | None] = [None] * self._world
        torch.distributed.all_gather_object(said, _text(error))
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise WorkerError(f"measuring failed on rank {rank}: {text}")
        return found  # type: ignore[return-value]

    def _tried(self, do: Callable[[], T]) -> tuple[T | None, Exception | None]:
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return None, kept
        try:
            return do(), None
        except Exception as error:  # raised after all have been told
            return None, error


def _text(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"
