"""An artifact: a TorchRL replay buffer whose rows are written once and never lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer, Writer
from torchrl.data.replay_buffers.samplers import Sampler

from tdhook_train.buffer.query import Queries
from tdhook_train.buffer.row import Row
from tdhook_train.buffer.storage import GrowingMemmapStorage
from tdhook_train.errors import SettingsError

__all__ = ["Artifact"]


class _Appending(Writer):
    """Writes behind the last committed row. The storage alone counts, so a write that fails takes up no row."""

    _storage: GrowingMemmapStorage

    def add(self, data: TensorDictBase) -> int:
        index = int(self._storage.extend(data.unsqueeze(0)))
        self._mark_update_entities(torch.tensor(index, device="cpu"))
        return index

    def extend(self, data: TensorDictBase) -> Tensor:
        index = self._storage.extend(data)
        self._mark_update_entities(index)
        return index

    def _mark_update_entities(self, index: Tensor) -> None:
        for entity in self._storage._attached_entities_iter():
            entity.mark_update(index)

    def _empty(self, empty_write_count: bool = True) -> None:  # noqa: ARG002
        self._storage._empty()

    def dumps(self, path: Any) -> None:
        """Nothing to write: the files of the storage say how many rows there are."""

    def loads(self, path: Any) -> None:
        """Nothing to read: see :meth:`dumps`."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore: see :meth:`dumps`."""


class Artifact(Queries, TensorDictReplayBuffer):
    """The rows of one artifact, as a replay buffer and as a table over steps.

    What TorchRL offers for reading works: ``sample``, ``len``, indexing, samplers, transforms. Writing goes by whole
    rows (``ArtifactBuffer.append``, or ``extend`` and ``add`` with rows that hold their ``meta``); a row that differs
    from the schema is refused whole, and no row is ever changed. Random numbers come from a generator of its own.

    Args:
        storage: where the rows are.
        seed: of the generator that samplers draw from.
        refresh: what to call before reading, while another process writes.
    """

    def __init__(self, storage: GrowingMemmapStorage, *, seed: int, refresh: Callable[[], None] | None = None) -> None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        super().__init__(storage=storage, writer=_Appending(compilable=True), generator=generator)
        self._refresh = refresh

    def refresh(self) -> None:
        """Take in what another process has written since."""
        if self._refresh is not None:
            self._refresh()
        super().refresh()

    def __len__(self) -> int:
        self.refresh()
        return int(super().__len__())

    def _sample(self, batch_size: int) -> tuple[Any, dict[str, Any]]:
        self.refresh()
        sample: tuple[Any, dict[str, Any]] = super()._sample(batch_size)
        return sample

    def __getitem__(self, index: Any) -> Any:
        """Return copies of rows, in the order they were written, or one key of all of them."""
        self.refresh()
        if _is_key(index) and not len(self.transform):
            return self._storage.column(self._known(index)).clone()
        # of a slice TorchRL gives a view of the file; what was measured is not to be changed by accident
        return super().__getitem__(index).clone()

    def set_sampler(self, sampler: Sampler) -> Sampler:
        """Set a sampler and return the one before; it draws from this artifact's generator."""
        sampler._rng = self._rng
        return super().set_sampler(sampler)

    def append_row(self, row: Row) -> int:
        """Commit one row, given by key, and return its position."""
        with self._replay_lock:
            return self._storage.append(row)

    def add(self, data: TensorDictBase) -> int:
        """Commit one row that holds its ``meta``, and return its position."""
        return int(super().add(data.copy()))  # TorchRL puts an "index" into what it is given

    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> Tensor:
        """Commit several rows that hold their ``meta``, batch first, and return their positions."""
        index: Tensor = super().extend(tensordicts.copy(), update_priority=update_priority)
        return index

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise SettingsError(f"rows of {self._storage.name!r} are written once; append a new row instead")

    __setitem__ = set_at_ = set_ = update_ = update_if_present = submit_update_if_present = _refuse


def _is_key(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return bool(parts) and all(isinstance(part, str) for part in parts)
