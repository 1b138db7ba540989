"""A run's folder as a mapping of names to artifacts, which follows another process that writes there."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tdhook_train.buffer import events, folder
from tdhook_train.buffer.artifact import Artifact
from tdhook_train.buffer.declaration import Declaration
from tdhook_train.buffer.entry import Entry
from tdhook_train.buffer.lock import WriterLock
from tdhook_train.buffer.manifest import Manifest, warn_of
from tdhook_train.buffer.row_writer import RowWriter
from tdhook_train.buffer.rows import Damaged, Rows
from tdhook_train.buffer.storage import GrowingMemmapStorage
from tdhook_train.errors import DamagedError, KeyMissingError, did_you_mean

__all__ = ["Run"]


class Run:
    """What can be read of a run, whether this process writes it or another one."""

    def _begin(self, path: Path, mode: Literal["r", "a"], seed: int, damaged: Damaged = "raise") -> None:
        self.path = path.absolute()  # the working directory may change under a run
        self.seed = seed
        self._mode = mode
        self._damaged = damaged
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

    @property
    def origin(self) -> dict[str, Any]:
        """Where the run comes from: its ``run`` (a name no other has), when ``created``, ``attempt``, ``versions``."""
        self.follow()
        manifest = self._manifest
        return {
            "run": manifest.run,
            "created": manifest.created,
            "attempt": manifest.attempt,
            "versions": dict(manifest.versions),
        }

    def follow(self) -> None:
        """Take in which artifacts another process has begun since."""
        if self._mode == "a" or (seen := folder.signature(self.path)) in (None, self._seen):
            return
        manifest = Manifest.read(self.path)
        if manifest.run != self._manifest.run:
            self._artifacts.clear()  # the folder was overwritten by another run
        self._manifest, self._seen = manifest, seen

    def _find_manifest(self) -> Manifest:
        """Return the manifest, or what can be made of it from what lies beside the rows."""
        try:
            return Manifest.find(self.path)
        except DamagedError:
            recovered = Manifest.recover(self.path) if self._mode == "r" else None
            if recovered is None:
                raise
            warn_of(self.path, "damaged", recovered)
            return recovered

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """Return the names of the artifacts that have rows, in the order they were declared."""
        self.follow()
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
            self._artifacts[name] = self._artifact(name, self._rows(name, entry))
        artifact = self._artifacts[name]
        artifact.refresh()
        return artifact

    def _rows(self, name: str, entry: Entry) -> Rows:
        if self._mode == "r" or self._closed:
            return Rows(self.path / name, entry, damaged=self._damaged)
        entry = self._limited(entry)
        return RowWriter(self.path / name, entry, mode="a", attempt=self.attempt, damaged=self._damaged)

    def _limited(self, entry: Entry) -> Entry:
        """Return an entry with the limits that hold for it."""
        return replace(entry, retention=entry.retention or self._manifest.retention)

    def _artifact(self, name: str, rows: Rows) -> Artifact:
        seed = zlib.crc32(name.encode(), self.seed)  # artifacts of one run draw apart
        return Artifact(GrowingMemmapStorage(rows), self, seed=seed)

    @property
    def runs(self) -> list[str]:
        """The labels of the runs that were merged into this one, by the number in ``("meta", "run")``."""
        return list(self._manifest.runs)

    def verify(self) -> list[str]:
        """Read everything there is, and return what is damaged, in words; an empty list if nothing is.

        Rows written without checksums (those of 1 MB and more, unless declared otherwise) count as whole.
        """
        return [text for name in self for text in self[name].storage.disk.verify()]

    def __repr__(self) -> str:
        state = "closed" if self._closed else {"r": "reading", "a": "writing"}[self._mode]
        return f"ArtifactBuffer({str(self.path)!r}, {state}, artifacts={self.keys()})"

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return what was noted, in that order; a line cut short by a kill is left out."""
        return events.read(self.path, kind)
