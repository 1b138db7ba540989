"""What checkpoints are measured on: a batch, probe sets, or what a run was measured on while it trained."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import SettingsError
from tdhook_train.observer import ProbeSet
from tdhook_train.observer.sources import Live, Sources, stored_names, stored_versions
from tdhook_train.observer.subject import keys_beside

__all__ = ["Data", "data_of"]


class Data:
    """Probe sets that are the same for every checkpoint.

    Args:
        on: a probe set, or several by name.
    """

    def __init__(self, on: ProbeSet | Mapping[str, Live | ProbeSet]) -> None:
        self.sources = Sources(on)
        self.initial: Path | None = None  # weights at initialisation that a run keeps
        self.keys: Mapping[str, Any] = {}  # that a plain module was given there

    def at(self, step: int) -> tuple[int, int] | None:  # noqa: ARG002 - of a run it matters
        """Turn to what a step is measured on; return its frames and epoch where they are known."""
        return None


class _OfRun(Data):
    """What a run was measured on while it trained: of every step the version of then, with its frames and epoch.

    Args:
        run: its folder, or the buffer.

    Raises:
        SettingsError: it keeps no probe set: it was measured on batches of the training.
    """

    def __init__(self, run: ArtifactBuffer | str | os.PathLike[str]) -> None:
        path = run.path if isinstance(run, ArtifactBuffer) else Path(run)
        self._folder = path / "probe_sets"
        names = stored_names(self._folder)
        if not names:
            raise SettingsError(f"{path} keeps no probe set, since it was measured on batches in training; give data=")
        with ArtifactBuffer.open(path) as buffer:
            self._moments = {name: dict(_moments(buffer, name, names)) for name in names}
        self._versions = {name: stored_versions(self._folder, name) for name in names}
        first = {name: ProbeSet.load(next(iter(paths.values()))) for name, paths in self._versions.items()}
        super().__init__(first[""] if list(first) == [""] else first)
        self._known = first
        initial = path / "initial" / "weights.pt"
        self.initial = initial if initial.is_file() else None
        if (keys := keys_beside(initial)).is_file():
            self.keys = torch.load(keys, weights_only=True)

    def at(self, step: int) -> tuple[int, int] | None:
        """Turn to the versions of the last row up to this step."""
        for name, moments in self._moments.items():
            known = max((moment for moment in moments if moment <= step), default=None)
            data = None if known is None else moments[known][2]
            if data in self._versions[name] and data != self._known[name].fingerprint:
                self._known[name].take_over(ProbeSet.load(self._versions[name][data]))
        live = (moments[step] for moments in self._moments.values() if step in moments)
        return next(((frames, epoch) for frames, epoch, _ in live), None)


def data_of(given: Any) -> Data:
    """Bring what a user gives to one form.

    Raises:
        SettingsError: something else, or a probe set that is not complete.
    """
    if isinstance(given, ArtifactBuffer | str | os.PathLike):
        return _OfRun(given)
    if isinstance(given, Mapping) and not isinstance(given, TensorDictBase):
        return Data({str(name): _probe_set(one) for name, one in given.items()})
    return Data(_probe_set(given))


def _probe_set(given: Any) -> ProbeSet:
    if isinstance(given, TensorDictBase):
        return ProbeSet(given)
    if not isinstance(given, ProbeSet):
        raise SettingsError(
            f"data= takes a TensorDict, a ProbeSet, several by name, or a run's folder; got a {type(given).__name__}"
        )
    if not given.ready:
        raise SettingsError(f"data={given!r} is not complete")
    return given


def _moments(buffer: ArtifactBuffer, source: str, sources: list[str]) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Yield each step that has a row of a source, with its frames, its epoch and the fingerprint of the data."""
    for name in buffer:
        of = max((one for one in sources if name.endswith(f".{one}" if one else "")), key=len, default=None)
        if of == source:
            meta = [buffer[name].series(("meta", key)).tolist() for key in ("step", "frames", "epoch", "data")]
            yield from ((step, (frames, epoch, data)) for step, frames, epoch, data in zip(*meta, strict=True))
