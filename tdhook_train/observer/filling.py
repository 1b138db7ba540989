"""Batches of a collector on their way to becoming a probe set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.errors import GroupsError
from tdhook_train.observer.trajectories import copied, whole
from tdhook_train.undo import Undo

__all__ = ["Filling"]


class Filling:
    """Collects frames until there are enough.

    Args:
        frames: how many are enough.
        collector: where to listen; None where batches are handed over.
        add: told each batch of the collector; gives it back.

    Raises:
        GroupsError: the collector does not let its batches be seen.
    """

    def __init__(
        self, frames: int, collector: Any = None, add: Callable[[TensorDictBase], TensorDictBase] | None = None
    ) -> None:
        self.frames = frames
        self._undo = Undo()
        self._batches: list[TensorDictBase] = []
        if collector is not None and add is not None:
            if not hasattr(collector, "postproc"):
                raise GroupsError(
                    f"{type(collector).__name__} does not let its batches be seen on the way; "
                    "use ProbeSet.first(frames=...) and call probe_set.add(batch) in the loop"
                )
            self._undo.callback(_Passing(collector, add).stop)

    @property
    def seen(self) -> int:
        """Frames so far."""
        return sum(batch.numel() for batch in self._batches)

    @property
    def full(self) -> bool:
        """Whether these are enough."""
        return self.seen >= self.frames

    def take(self, batch: TensorDictBase) -> None:
        """Keep a copy of a batch, ``[time]`` or ``[environments, time]``."""
        self._batches.append(copied(batch))

    def taken(self) -> tuple[TensorDictBase, Tensor | None]:
        """Return the first frames, joined in time, without trajectories that were cut off, and the trajectories."""
        joined = torch.cat(self._batches, dim=-1)
        steps = self.frames // max(joined.numel() // joined.shape[-1], 1)
        return whole(joined[..., :steps])

    def release(self) -> None:
        """Give the collector its slot back."""
        self._undo.close()

    def stop(self) -> None:
        """Give the collector its slot back, and up what was collected."""
        self._batches = []
        self.release()


class _Passing:
    """In a collector's ``postproc`` slot, shows its batches to somebody after whatever was in the slot before."""

    def __init__(self, collector: Any, add: Callable[[TensorDictBase], TensorDictBase]) -> None:
        self._collector = collector
        self._add: Callable[[TensorDictBase], TensorDictBase] | None = add
        self._before = collector.postproc
        collector.postproc = self

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        given = batch if self._before is None else self._before(batch)
        return given if self._add is None else self._add(given)

    def stop(self) -> None:
        """Leave the slot, from under others of our kind too; under somebody else's postproc, only pass from now on."""
        self._add = None
        top = _listening(self._collector.postproc)
        if top is not self._collector.postproc:
            self._collector.postproc = top
        while isinstance(top, _Passing):
            top._before = _listening(top._before)
            top = top._before


def _listening(slot: Any) -> Any:
    while isinstance(slot, _Passing) and slot._add is None:
        slot = slot._before
    return slot
