"""A run's folder as a mapping of names to artifacts, which follows another process that writes there."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tdhook_train.buffer import events, folder
from tdhook_train.buffer.artifact import Artifact
from tdhook_train.buffer.lock import WriterLock
from tdhook_train.buffer.manifest import Entry, Manifest
from tdhook_train.buffer.schema import Declaration
from tdhook_train.buffer.storage import GrowingMemmapStorage
from tdhook_train.errors import KeyMissingError, did_you_mean

__all__ = ["Run"]


class Run:
    """What can be read of a run, whether this process writes it or another one."""

    def _begin(self, path: Path, mode: Literal["r", "a"], seed: int) -> None:
        self.path = path.absolute()  # the working directory may change under a run
        self.seed = seed
        self._mode = mode
        self._closed = False
        self._lock: WriterLock | None = None
        self._process = os.getpid()
        self._seen: tuple[int, int, int] | None = None
        self._manifest = Manifest.new()
        self._declared: dict[str, Declaration] = {}
        self._artifacts: dict[str, Artifact] = {}

    @property
    def attempt(self) -> int:
        """How often the run was reopened for writing."""
        return self._manifest.attempt

    def _refresh(self) -> None:
        if self._mode == "a" or (seen := folder.signature(self.path)) in (None, self._seen):
            return
        manifest = Manifest.read(self.path)
        if manifest.run != self._manifest.run:
            self._artifacts.clear()  # the folder was overwritten by another run
        for name, artifact in self._artifacts.items():
            if (entry := manifest.artifacts[name]).generation != artifact.storage.generation:
                artifact.storage.attach_files(entry.generation)
        self._manifest, self._seen = manifest, seen

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """Return the names of the artifacts that have rows, in the order they were declared."""
        self._refresh()
        return list(self._manifest.artifacts)

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, name: str) -> Artifact:
        """Return an artifact.

        Raises:
            KeyMissingError: no row was ever appended under that name.
        """
        if name not in self:
            raise KeyMissingError(f"{self.path} has no artifact {name!r}{did_you_mean(str(name), self)}")
        if name not in self._artifacts:
            entry = self._manifest.artifacts[name]
            mode: Literal["r", "a"] = "r" if self._mode == "r" or self._closed else "a"
            self._artifacts[name] = self._open_artifact(name, entry, mode)
        artifact = self._artifacts[name]
        artifact.refresh()
        return artifact

    def _open_artifact(self, name: str, entry: Entry, mode: Literal["r", "w", "a"]) -> Artifact:
        storage = GrowingMemmapStorage(
            self.path / name, entry.schema, mode=mode, name=name, generation=entry.generation
        )
        seed = zlib.crc32(name.encode(), self.seed)  # artifacts of one run draw apart
        return Artifact(storage, seed=seed, refresh=self._refresh if mode == "r" else None)

    def __repr__(self) -> str:
        state = "closed" if self._closed else {"r": "reading", "a": "writing"}[self._mode]
        return f"ArtifactBuffer({str(self.path)!r}, {state}, artifacts={self.keys()})"

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return what was noted, in that order; a line cut short by a kill is left out."""
        return events.read(self.path, kind)
