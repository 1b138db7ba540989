"""An artifact: a TorchRL replay buffer whose rows are written once and never lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer, Writer
from torchrl.data.replay_buffers.samplers import Sampler

from tdhook_train.buffer.query import Queries
from tdhook_train.buffer.row import Key, RowMeta, Value, with_meta
from tdhook_train.buffer.storage import GrowingMemmapStorage
from tdhook_train.errors import SchemaError, SettingsError

if TYPE_CHECKING:
    from tdhook_train.buffer.run import Run

__all__ = ["Artifact"]

_DRAWS = 16


class _Appending(Writer):
    """Writes behind the last committed row. The storage alone counts, so a write that fails takes up no row."""

    _storage: GrowingMemmapStorage

    def add(self, data: TensorDictBase) -> int:
        index = self.extend(data.unsqueeze(0))
        return int(index) if len(index) else -1

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

    What TorchRL offers for reading works: ``sample``, ``len``, indexing, samplers, transforms; :meth:`replay` gives a
    second replay buffer over the same rows, with a batch size and a sampler of its own. Writing goes by whole rows
    (``ArtifactBuffer.append`` and ``extend``, or ``extend`` and ``add`` here with rows that hold their ``meta``); a row
    that differs from the schema is refused whole, and no row is ever changed. Random numbers come from a generator of
    its own.

    Iterating gives the rows one by one in step order, or, where a batch size was set, what TorchRL's iteration gives.

    Args:
        storage: where the rows are.
        run: whose artifact it is.
        seed: of the generator that samplers draw from.
        replay: as for TorchRL's ``TensorDictReplayBuffer``.
    """

    def __init__(self, storage: GrowingMemmapStorage, run: Run, *, seed: int, **replay: Any) -> None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        super().__init__(storage=storage, writer=_Appending(compilable=True), generator=generator, **replay)
        self._run = run
        self._seed = seed

    def replay(
        self,
        *,
        batch_size: int | None = None,
        sampler: Sampler | None = None,
        transform: Any = None,
        prefetch: int | None = None,
        seed: int | None = None,
    ) -> Artifact:
        """Return another replay buffer over the same rows, for instance to train a probe or an autoencoder on them.

        Args:
            batch_size: of ``sample()`` and of iteration.
            sampler: which rows are drawn; at random with replacement, if None.
            transform: applied to what is read.
            prefetch: how many batches are read ahead, in threads.
            seed: of the generator that the sampler draws from; that of this one, if None.
        """
        given = {"batch_size": batch_size, "sampler": sampler, "transform": transform, "prefetch": prefetch}
        chosen = {name: value for name, value in given.items() if value is not None}
        other = Artifact(self._storage, self._run, seed=self._seed if seed is None else seed, **chosen)
        if sampler is not None:
            other._take_in(sampler)
        return other

    def __iter__(self) -> Iterator[TensorDictBase]:
        if self._batch_size is not None:
            return super().__iter__()
        return map(self.transform, self.in_order()) if len(self.transform) else self.in_order()

    def refresh(self) -> None:
        """Take in what another process has written since."""
        if not self._storage.writable:
            self._run.follow()
        super().refresh()

    @property
    def runs(self) -> list[str]:
        """The labels of the merged runs, by the number in ``("meta", "run")``."""
        return self._run.runs

    def __len__(self) -> int:
        self.refresh()
        return int(super().__len__())

    def _sample(self, batch_size: int) -> tuple[Any, dict[str, Any]]:
        for _ in range(_DRAWS):
            self.refresh()
            with suppress(IndexError):  # another process has dropped rows that were drawn
                sample: tuple[Any, dict[str, Any]] = super()._sample(batch_size)
                return sample
        return super()._sample(batch_size)

    def __getitem__(self, index: Any) -> Any:
        """Return copies of rows, in the order they were written, or one key of all of them."""
        self.refresh()
        if _is_key(index) and not len(self.transform):
            return self._kept(self._known(index), *self._storage.disk.index())
        if isinstance(index, slice):  # of which TorchRL gives a view of the files
            places, words = self._storage.disk.index()
            rows = self._table(places[index], words[index], None)
            return self.transform(rows) if len(self.transform) else rows
        rows = super().__getitem__(index)
        return rows.clone() if self._storage.disk.own else rows  # what was measured is not to be changed by accident

    def set_sampler(self, sampler: Sampler) -> Sampler:
        """Set a sampler and return the one before; it draws from this artifact's generator."""
        before = super().set_sampler(sampler)
        self._take_in(sampler)
        return before

    def _take_in(self, sampler: Sampler) -> None:
        sampler._rng = self._rng
        sampler.extend(torch.arange(len(self), device="cpu"))  # those with priorities know of no row they were not told

    def append_row(self, row: Mapping[Key, Value], meta: RowMeta) -> int:
        """Commit one row, given by key, and return its position."""
        numbers = meta.numbers()
        with self._replay_lock:
            return self._storage.append(row, numbers)

    def add(self, data: TensorDictBase) -> int:
        """Commit one row that holds its ``meta``, of which all but the step may be left out.

        Returns:
            Its position, -1 where retention keeps others instead.
        """
        if not isinstance(data, TensorDictBase):
            raise SchemaError(f"{self._storage.name}: a row comes as a TensorDict, got {type(data).__name__}")
        index = self.extend(data.unsqueeze(0))
        return int(index) if len(index) else -1

    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> Tensor:  # noqa: ARG002
        """Commit several rows that hold their ``meta``, batch first; of the meta, all but the step may be left out.

        Args:
            tensordicts: the rows.
            update_priority: taken as TorchRL takes it, but rows come in with the sampler's default priority.

        Returns:
            The positions of those that are kept, int64.
        """
        return self.extend_rows(with_meta(tensordicts, self._storage.name, self._run.attempt))

    def extend_rows(self, rows: TensorDictBase) -> Tensor:
        """Commit several rows with all of their meta, and return the positions of those that are kept."""
        if len(self.transform):
            rows = self.transform.inv(rows)
        with self._replay_lock:  # TorchRL's own would write the positions of all into the rows
            index: Tensor = self._writer.extend(rows)
            self._sampler.extend(index)
        return index

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise SettingsError(f"rows of {self._storage.name!r} are written once; append a new row instead")

    __setitem__ = set_at_ = set_ = update_ = update_if_present = submit_update_if_present = _refuse


def _is_key(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return bool(parts) and all(isinstance(part, str) for part in parts)
