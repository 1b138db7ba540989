"""A fixed batch on which a training is measured, so that what changes is the network alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import GroupsError, KeyMissingError, SettingsError
from tdhook_train.keys import path_of
from tdhook_train.ops.files import whole_file
from tdhook_train.ops.fingerprint import fingerprint
from tdhook_train.ops.folds import in_blocks
from tdhook_train.undo import Undo

__all__ = ["ProbeSet", "copied"]

_TRAJECTORY_KEYS: tuple[NestedKey, ...] = (("collector", "traj_ids"), "traj_ids")
_DONE_KEYS: tuple[NestedKey, ...] = (("next", "done"), "done")

Groups = Any  # a tensor, a key of the batch, "auto" or "rows"


class ProbeSet:
    """A fixed batch, its rows told apart by trajectory.

    Args:
        td: the batch, ``[rows, ...]`` or ``[environments, time]``, which is laid end to end. Rows of a trajectory
            are taken to be in the order of time.
        groups: trajectory of each row: a tensor, a key of the batch, ``"auto"`` (TorchRL's trajectory ids, else cut
            at done flags, else unknown) or ``"rows"`` (each row on its own: independent samples).
        feature_names: labels of the features of a key, e.g. ``{"observation": ["x", "v"]}``.

    Raises:
        KeyMissingError: ``groups`` or ``feature_names`` names a key that the batch has not.
        GroupsError: as many groups as rows are needed.
    """

    def __init__(
        self,
        td: TensorDictBase | None,
        *,
        groups: Groups = "auto",
        feature_names: Mapping[NestedKey, Sequence[str]] | None = None,
    ) -> None:
        self.feature_names = {key: list(names) for key, names in (feature_names or {}).items()}
        self._wanted = groups
        self._td: TensorDictBase | None = None
        self._pending = _Pending(0)
        self.shape: tuple[int, ...] = ()  # of the batch that was laid end to end
        if td is not None:
            self._fix(_rows(td), tuple(td.batch_size))

    @classmethod
    def first(
        cls,
        collector: Any = None,
        *,
        frames: int = 2048,
        feature_names: Mapping[NestedKey, Sequence[str]] | None = None,
    ) -> ProbeSet:
        """Keep the first frames that a TorchRL collector gives out, whole trajectories in time order.

        The collector's batches are copied as they pass, by its ``postproc`` slot, which is put back when there are
        enough, or when an observer on them is closed. A trajectory that is cut off at the end is dropped, unless there
        is no other. Until then the probe set is not :attr:`ready` and ticks on it are skipped.

        Args:
            collector: a TorchRL collector that runs in this process; None to call :meth:`add` by hand.
            frames: how many frames to keep, at most.
            feature_names: as above.
        """
        if frames < 2:
            raise SettingsError(f"a probe set needs at least 2 frames, got frames={frames}")
        probe_set = cls(None, feature_names=feature_names)
        probe_set._pending = _Pending(frames)
        if collector is not None:
            probe_set._pending.listen(collector, probe_set.add)
        return probe_set

    def add(self, batch: TensorDictBase) -> TensorDictBase:
        """Take a collected batch into a probe set that is still filling; give the batch back untouched."""
        if not self.ready:
            self._pending.take(batch)
            if self._pending.full:
                self._fix(self._pending.whole_trajectories())
        return batch

    def release(self) -> None:
        """Let go of the collector; a probe set that is still filling is then filled by :meth:`add` alone."""
        self._pending.undo.close()

    def take_over(self, other: ProbeSet) -> None:
        """Become another, complete probe set, as a resumed run needs that has collected its first frames before."""
        self._wanted = "rows" if other.independent else "auto" if other.groups is None else other.groups
        self._fix(other.td, other.shape)

    @property
    def ready(self) -> bool:
        """Whether the batch is complete."""
        return self._td is not None

    @property
    def td(self) -> TensorDictBase:
        """The batch, ``[rows]``."""
        if self._td is None:
            raise KeyMissingError(
                f"the probe set is not complete: {self._pending.seen} of {self._pending.frames} frames"
            )
        return self._td

    def __len__(self) -> int:
        return 0 if self._td is None else len(self._td)

    def __repr__(self) -> str:
        if not self.ready:
            return f"ProbeSet({self._pending.seen} of {self._pending.frames} frames so far)"
        many = "unknown" if self.groups is None else len(self.groups.unique())
        return f"ProbeSet({len(self)} rows, trajectories: {many}, {self.fingerprint:#x})"

    def _fix(self, td: TensorDictBase, shape: tuple[int, ...] | None = None) -> None:
        self._td = td
        self.shape = tuple(td.batch_size) if shape is None else shape
        self.groups = _groups(td, self._wanted, self.shape)
        self.independent = isinstance(self._wanted, str) and self._wanted == "rows"
        self.ordered = self.groups is not None and not self.independent and in_blocks(self.groups)
        self.fingerprint = fingerprint(td)
        self._pending.undo.close()
        for key, names in self.feature_names.items():
            if key not in td.keys(include_nested=True):
                raise KeyMissingError(f"feature_names names {key!r}, which the probe set has not")
            if td.get(key).shape[-1] != len(names):
                raise SettingsError(
                    f"feature_names has {len(names)} names for {key!r} of {td.get(key).shape[-1]} features"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the probe set to one file."""
        names = [[list(path_of(key)), labels] for key, labels in self.feature_names.items()]
        state = {"td": self.td.cpu().to_dict(), "groups": self.groups, "independent": self.independent, "names": names}
        state["shape"] = list(self.shape)
        with whole_file(Path(path)) as partial:
            torch.save(state, partial)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProbeSet:
        """Read a probe set that :meth:`save` wrote."""
        if not Path(path).is_file():
            raise KeyMissingError(f"{path} is no file of a probe set")
        state = torch.load(path, weights_only=True)
        rows = len(next(iter(TensorDict(state["td"]).values(include_nested=True, leaves_only=True))))
        names = {tuple(key) if len(key) > 1 else key[0]: labels for key, labels in state["names"]}
        groups = "rows" if state["independent"] else "auto" if state["groups"] is None else state["groups"]
        td = TensorDict(state["td"], batch_size=[rows]).reshape(state.get("shape", [rows]))
        return cls(td, groups=groups, feature_names=names)


def copied(batch: TensorDictBase) -> TensorDictBase:
    """Copy a batch of a collector, which may use its memory again; what it keeps for itself is left out."""
    private = [key for key in batch.keys(include_nested=True) if any(p.startswith("_") for p in path_of(key))]
    return batch.exclude(*private).detach().clone()


class _Pending:
    """Batches on their way to becoming a probe set."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.undo = Undo()
        self._batches: list[TensorDictBase] = []

    @property
    def seen(self) -> int:
        return sum(batch.numel() for batch in self._batches)

    @property
    def full(self) -> bool:
        return self.seen >= self.frames

    def listen(self, collector: Any, add: Any) -> None:
        if not hasattr(collector, "postproc"):
            raise GroupsError(
                f"{type(collector).__name__} does not let its batches be seen on the way; "
                "use ProbeSet.first(frames=...) and call probe_set.add(batch) in the loop"
            )
        before = collector.postproc

        def passing(batch: TensorDictBase) -> TensorDictBase:
            return add(batch if before is None else before(batch))

        def put_back() -> None:
            if collector.postproc is passing:  # somebody's own postproc may wrap ours by now: then ours only passes
                collector.postproc = before

        collector.postproc = passing
        self.undo.callback(put_back)

    def take(self, batch: TensorDictBase) -> None:
        self._batches.append(copied(batch))

    def whole_trajectories(self) -> TensorDictBase:
        """Join the batches in time, keep the first frames, and drop trajectories that were cut off."""
        joined = torch.cat(self._batches, dim=-1)
        self._batches = []
        steps = self.frames // max(joined.numel() // joined.shape[-1], 1)
        joined = joined[..., :steps]
        td = _rows(joined)
        groups = _groups(td, "auto", tuple(joined.shape))
        if groups is None:
            return td
        last = _done(td)
        whole = groups[last].unique() if last is not None else groups.unique()
        keep = torch.isin(groups, whole)
        return td[keep] if keep.any() else td


def _rows(td: TensorDictBase) -> TensorDictBase:
    """Lay environments end to end, each in the order of time."""
    if td.batch_dims == 0:
        raise SettingsError("a probe set needs a batch of rows; the TensorDict has batch_size=[]")
    return td.detach().reshape(-1).clone()


def _done(td: TensorDictBase) -> Tensor | None:
    key = next((key for key in _DONE_KEYS if key in td.keys(include_nested=True)), None)
    return None if key is None else td.get(key).reshape(len(td), -1).any(1)


def _groups(td: TensorDictBase, wanted: Groups, shape: tuple[int, ...]) -> Tensor | None:
    if isinstance(wanted, Tensor):
        if wanted.numel() != len(td):
            raise GroupsError(f"groups has {wanted.numel()} entries for {len(td)} rows")
        return wanted.reshape(-1).cpu().to(torch.int64)
    if wanted == "rows":
        return torch.arange(len(td))
    keys = _TRAJECTORY_KEYS if wanted == "auto" else (wanted,)
    for key in keys:
        if key in td.keys(include_nested=True):
            return td.get(key).reshape(len(td), -1)[:, 0].cpu().to(torch.int64)
    if wanted != "auto":
        raise KeyMissingError(f"groups={wanted!r} is no key of the probe set")
    done = _done(td)
    if done is None:
        return None
    # a new trajectory begins on the row after a done flag, and with each environment
    begins = done.cpu().roll(1)
    begins.view(-1, shape[-1])[:, 0] = True
    return begins.long().cumsum(0) - 1
