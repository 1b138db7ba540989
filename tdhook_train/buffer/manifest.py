"""What a run's folder holds, in one file that people can read."""

from __future__ import annotations

import json
import os
import platform
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tdhook_train.buffer.schema import Schema
from tdhook_train.errors import SchemaError

__all__ = ["MANIFEST", "Entry", "Manifest", "write_atomically"]

MANIFEST = "manifest.json"
FORMAT = 1
_PACKAGES = {"torch": "torch", "tensordict": "tensordict", "torchrl": "torchrl", "tdhook_train": "tdhook-train"}


@dataclass(frozen=True)
class Entry:
    """An artifact in the manifest: what its rows look like, and which set of files holds them."""

    schema: Schema
    generation: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a run's folder holds.

    Args:
        run: a name no other run has, so that a reader notices a folder that was overwritten.
        created: when the run began, in ISO 8601.
        attempt: how often it was reopened for writing.
        versions: of the libraries that began it.
        artifacts: by name, in the order they were declared.
        folders: sub-folders for other files.
    """

    run: str
    created: str
    attempt: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, Entry] = field(default_factory=dict)
    folders: tuple[str, ...] = ()

    @classmethod
    def new(cls) -> Manifest:
        """Return the manifest of a run that begins now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(run=uuid.uuid4().hex, created=now, versions=_versions())

    def with_entry(self, name: str, entry: Entry, order: list[str]) -> Manifest:
        """Return a copy that lists ``name``, its artifacts in the given order as far as that goes."""
        entries = {**self.artifacts, name: entry}
        names = sorted(entries, key=lambda n: order.index(n) if n in order else -1)
        return replace(self, artifacts={n: entries[n] for n in names})

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest, all at once."""
        artifacts = {n: {"generation": e.generation, **e.schema.to_json()} for n, e in self.artifacts.items()}
        text = {
            "format": FORMAT,
            "run": self.run,
            "created": self.created,
            "attempt": self.attempt,
            "versions": dict(self.versions),
            "folders": list(self.folders),
            "artifacts": artifacts,
        }
        write_atomically(folder / MANIFEST, json.dumps(text, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            SchemaError: the file is none of ours, or of a later format.
        """
        path = folder / MANIFEST
        try:
            text: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            given = text["format"]
            if given != FORMAT:
                raise SchemaError(f"{path} has format {given!r}, expected {FORMAT}: a newer tdhook-train wrote it")
            entries = {n: Entry(Schema.from_json(a), a["generation"]) for n, a in text["artifacts"].items()}
            return cls(text["run"], text["created"], text["attempt"], text["versions"], entries, tuple(text["folders"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, SchemaError):
                raise
            raise SchemaError(f"{path} is no manifest of a run: {error!r}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new one, and no other file is left behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name, package in _PACKAGES.items():
        try:
            versions[name] = version(package)
        except PackageNotFoundError:  # run from a checkout
            versions[name] = "unknown"
    return versions
