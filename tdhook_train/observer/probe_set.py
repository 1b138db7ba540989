"""A batch on which a training is measured, fixed or exchanged now and then, so that what changes is known."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from torch import Tensor, nn

from tdhook_train.errors import KeyMissingError, SettingsError, did_you_mean
from tdhook_train.isolation import in_place
from tdhook_train.keys import path_of
from tdhook_train.observer.filling import Filling
from tdhook_train.observer.trajectories import Groups, copied, groups_of, in_rows, whole
from tdhook_train.ops.files import whole_file
from tdhook_train.ops.fingerprint import fingerprint
from tdhook_train.ops.folds import in_blocks
from tdhook_train.schedule import Trigger
from tdhook_train.undo import Undo, kept_randomness

__all__ = ["ProbeSet"]

_EXPLORATION = ("random", "deterministic")


class ProbeSet:
    """A batch to measure on, its rows told apart by trajectory: fixed, unless it is refreshed.

    Give it states that were collected in the order of time, never what the sampler of a training buffer draws: that
    changes the sampler's state, and its rows are in no order.

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
        self.refresh_when: Trigger | None = None
        self._wanted = groups
        self._td: TensorDictBase | None = None
        self._fill: Callable[[], Filling] | None = None
        self._filling: Filling | None = None
        self.shape: tuple[int, ...] = ()  # of the batch that was laid end to end
        if td is not None:
            self._fix(in_rows(td), groups, tuple(td.batch_size))

    @classmethod
    def first(
        cls,
        collector: Any = None,
        *,
        frames: int = 2048,
        refresh: Trigger | None = None,
        feature_names: Mapping[NestedKey, Sequence[str]] | None = None,
    ) -> ProbeSet:
        """Keep the first frames that a TorchRL collector gives out, whole trajectories in time order.

        The collector's batches are copied as they pass, by its ``postproc`` slot, which is put back when there are
        enough, or when an observer on them is closed. A trajectory that is cut off at the end is dropped, unless there
        is no other. Until then the probe set is not :attr:`ready` and ticks on it are skipped.

        Args:
            collector: a TorchRL collector that runs in this process; None to call :meth:`add` by hand.
            frames: how many frames to keep, at most.
            refresh: when an observer is to exchange them for the frames collected from then on, e.g.
                ``Every(frames=100_000)``; asked at each step of the training. See :meth:`refresh`.
            feature_names: as above.
        """
        if frames < 2:
            raise SettingsError(f"a probe set needs at least 2 frames, got frames={frames}")
        if not isinstance(refresh, Trigger | None):
            raise SettingsError(f"refresh={refresh!r} is no trigger; e.g. refresh=Every(frames=100_000)")
        probe_set = cls(None, feature_names=feature_names)
        probe_set.refresh_when = refresh
        probe_set._fill = lambda: Filling(frames, collector, probe_set.add)
        probe_set._filling = probe_set._fill()
        return probe_set

    @classmethod
    def rollout(
        cls,
        env: Any,
        policy: Any = None,
        *,
        frames: int = 2048,
        seed: int = 0,
        exploration: Literal["random", "deterministic"] = "random",
        feature_names: Mapping[NestedKey, Sequence[str]] | None = None,
    ) -> ProbeSet:
        """Keep the states that a policy visits, whole trajectories in time order.

        Equal arguments give equal states. The policy is run in evaluation mode and left as it was, as are the random
        states of Python, NumPy and torch.

        Args:
            env: a function that makes a TorchRL environment, which is closed afterwards; or an environment of your
                own, which is seeded and stepped: not the collector's.
            policy: whatever ``env.rollout`` takes; random actions if None.
            frames: environment steps in all. A trajectory cut off at the end is dropped, unless there is no other.
            seed: of the environment and of what is drawn.
            exploration: the policy draws its actions, or acts by its mode.
            feature_names: as above.

        Raises:
            SettingsError: too few frames, another kind of exploration, or no environment.
        """
        if frames < 2:
            raise SettingsError(f"a probe set needs at least 2 frames, got frames={frames}")
        if exploration not in _EXPLORATION:
            near = did_you_mean(str(exploration), _EXPLORATION)
            raise SettingsError(f"exploration={exploration!r} is none of {', '.join(_EXPLORATION)}{near}")
        with Undo() as undo:
            undo.enter_context(kept_randomness(seed))
            if not isinstance(env, nn.Module):  # as every environment of TorchRL is; its class is none
                env = _made(env)
                undo.callback(env.close, raise_if_closed=False)
            undo.enter_context(in_place(policy if isinstance(policy, nn.Module) else nn.Module(), seed))
            undo.enter_context(set_interaction_type(InteractionType[exploration.upper()]))
            undo.enter_context(torch.no_grad())
            env.set_seed(seed)
            td = env.rollout(max(frames // env.batch_size.numel(), 1), policy, break_when_any_done=False)
        rows, groups = whole(copied(td))
        return cls(rows, groups="auto" if groups is None else groups, feature_names=feature_names)

    def refresh(self, td: TensorDictBase | ProbeSet | None = None, *, groups: Groups = None) -> None:
        """Exchange the states; rows measured from then on say so by their content hash, and none are mixed.

        An observer keeps every version that it measures on in the run's folder, and forgets what it remembers of the
        one before. Methods that write a value for each row need as many rows as before (``rows=``).

        Args:
            td: the new states, as for a new probe set, or another probe set; None for the frames that the collector
                of :meth:`first` gives out from now on, the old states staying until there are enough. These may begin
                in the middle of a trajectory.
            groups: of the new states; as before if None.

        Raises:
            SettingsError: no states, for a probe set that no collector fills.
        """
        if isinstance(td, ProbeSet):
            self.take_over(td)
        elif td is not None:
            before = "auto" if isinstance(self._wanted, Tensor) else self._wanted
            self._fix(in_rows(td), before if groups is None else groups, tuple(td.batch_size))
        elif self._fill is None:
            raise SettingsError("refresh() needs states: this probe set is not filled by a collector")
        elif self._filling is None:
            self._filling = self._fill()

    def add(self, batch: TensorDictBase) -> TensorDictBase:
        """Take a collected batch into a probe set that is filling; give the batch back untouched."""
        if self._filling is not None:
            self._filling.take(batch)
            if self._filling.full:
                td, groups = self._filling.taken()
                self._fix(td, "auto" if groups is None else groups)
        return batch

    def take_over(self, other: ProbeSet) -> None:
        """Become another, complete probe set, as a resumed run needs that has collected its first frames before."""
        known = "auto" if other.groups is None else other.groups
        self._fix(other.td, "rows" if other.independent else known, other.shape)

    def stay(self) -> None:
        """Keep the present states: a refresh that waits for more frames is given up."""
        if self.ready and self._filling is not None:
            self._filling.stop()
            self._filling = None

    def release(self) -> None:
        """Let go of the collector: first frames that are still missing are then taken by :meth:`add` alone."""
        if self._filling is not None:
            self._filling.release()

    @property
    def ready(self) -> bool:
        """Whether there is a batch to measure on."""
        return self._td is not None

    @property
    def filling(self) -> bool:
        """Whether it is waiting for frames, its first ones or those of a refresh."""
        return self._filling is not None

    @property
    def td(self) -> TensorDictBase:
        """The batch, ``[rows]``."""
        if self._td is None:
            raise KeyMissingError(f"the probe set is not complete: {self._progress}")
        return self._td

    @property
    def _progress(self) -> str:
        seen, frames = (0, 0) if self._filling is None else (self._filling.seen, self._filling.frames)
        return f"{seen} of {frames} frames"

    def __len__(self) -> int:
        return 0 if self._td is None else len(self._td)

    def __repr__(self) -> str:
        if not self.ready:
            return f"ProbeSet({self._progress} so far)"
        many = "unknown" if self.groups is None else len(self.groups.unique())
        return f"ProbeSet({len(self)} rows, trajectories: {many}, {self.fingerprint:#x})"

    def _fix(self, td: TensorDictBase, wanted: Groups, shape: tuple[int, ...] = ()) -> None:
        groups = groups_of(td, wanted, shape[-1] if shape else None)
        for key, names in self.feature_names.items():
            if key not in td.keys(include_nested=True):
                raise KeyMissingError(f"feature_names names {key!r}, which the probe set has not")
            if td.get(key).shape[-1] != len(names):
                raise SettingsError(
                    f"feature_names has {len(names)} names for {key!r} of {td.get(key).shape[-1]} features"
                )
        self._wanted, self._td, self.groups, self.shape = wanted, td, groups, shape
        self.independent = isinstance(wanted, str) and wanted == "rows"
        self.ordered = groups is not None and not self.independent and in_blocks(groups)
        self.fingerprint = fingerprint(td)
        self.stay()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the probe set to one file."""
        names = [[list(path_of(key)), labels] for key, labels in self.feature_names.items()]
        state = {"td": self.td.cpu().to_dict(), "groups": self.groups, "independent": self.independent, "names": names}
        state["shape"] = list(self.shape or self.td.batch_size)
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
        td = TensorDict(state["td"], batch_size=[rows]).reshape(state["shape"])
        return cls(td, groups=groups, feature_names=names)


def _made(make_env: Any) -> Any:
    env = make_env() if callable(make_env) else make_env
    if not hasattr(env, "rollout"):
        raise SettingsError(f"ProbeSet.rollout needs an environment or what makes one, got a {type(env).__name__}")
    return env
