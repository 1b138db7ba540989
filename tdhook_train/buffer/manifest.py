"""What a run's folder holds, in one file that people can read."""

from __future__ import annotations

import json
import os
import platform
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tdhook_train.buffer.disk import disk_errors
from tdhook_train.buffer.entry import Entry
from tdhook_train.buffer.retention import Retention
from tdhook_train.buffer.rows import Rows
from tdhook_train.errors import DamagedError, DamagedWarning, SchemaError

__all__ = ["MANIFEST", "SCHEMA", "Manifest", "warn_of", "write_atomically", "write_schema"]

MANIFEST = "manifest.json"
SCHEMA = "schema.json"  # in an artifact's folder: its part of the manifest once more
FORMAT = 2
_PACKAGES = {"torch": "torch", "tensordict": "tensordict", "torchrl": "torchrl", "tdhook_train": "tdhook-train"}


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
        retention: how many rows are kept of artifacts that have no limits of their own.
        runs: labels of the runs that were merged, by the number in ``("meta", "run")``; none for a run of its own.
    """

    run: str
    created: str
    attempt: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, Entry] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    retention: Retention = field(default_factory=Retention)

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
        text = {
            "format": FORMAT,
            "run": self.run,
            "created": self.created,
            "attempt": self.attempt,
            "versions": dict(self.versions),
            "runs": list(self.runs),
            "retention": self.retention.to_json(),
            "folders": list(self.folders),
            "artifacts": {name: entry.to_json() for name, entry in self.artifacts.items()},
        }
        write_atomically(folder / MANIFEST, json.dumps(text, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            DamagedError: the file is none of ours.
            SchemaError: it has another format.
        """
        path = folder / MANIFEST
        try:
            text: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            given = text["format"]
            if given != FORMAT:
                raise SchemaError(f"{path} has format {given!r}, expected {FORMAT}: another tdhook-train wrote it")
            return cls(
                run=text["run"],
                created=text["created"],
                attempt=text["attempt"],
                versions=text["versions"],
                artifacts={name: Entry.from_json(entry) for name, entry in text["artifacts"].items()},
                folders=tuple(text["folders"]),
                runs=tuple(text["runs"]),
                retention=Retention.from_json(text["retention"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, SchemaError):
                raise
            raise DamagedError(f"{path} is no manifest of a run: {error!r}; the rows beside it can be read") from error

    @classmethod
    def recover(cls, folder: Path) -> Manifest | None:
        """Return what can be known of a run without its manifest, None where there are no rows."""
        entries = {}
        for path in sorted(folder.glob(f"*/{SCHEMA}")):
            try:
                text = json.loads(path.read_text(encoding="utf-8"))
                entries[path.parent.name] = Entry.from_json(text)
            except (KeyError, TypeError, AttributeError, ValueError):
                continue
        attempts = [_last_attempt(folder / name, entry) for name, entry in entries.items()]
        return replace(cls.new(), artifacts=entries, attempt=max(attempts)) if entries else None

    @classmethod
    def find(cls, folder: Path) -> Manifest:
        """Return the manifest, or what can be known without it, with a warning.

        Raises:
            DamagedError: the manifest is damaged; to write over it could lose something.
        """
        try:
            return cls.read(folder)
        except FileNotFoundError:
            found = cls.recover(folder)
            if found is None:
                raise
        warn_of(folder, "missing", found)
        return found


def _last_attempt(folder: Path, entry: Entry) -> int:
    try:
        return Rows(folder, entry).last_attempt
    except DamagedError:
        return 0


def warn_of(folder: Path, what: str, found: Manifest) -> None:
    """Warn that a manifest was made again."""
    warnings.warn(
        f"{folder / MANIFEST} is {what}; it was made again from what lies beside the rows "
        f"({', '.join(found.artifacts)}), without the labels of runs and the names of other folders",
        DamagedWarning,
        stacklevel=5,
    )


def write_schema(folder: Path, entry: Entry) -> None:
    """Put an artifact's part of the manifest beside its rows, from where the manifest can be made again."""
    write_atomically(folder / SCHEMA, json.dumps(entry.to_json(), indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new one, and no other file is left behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(f"no room for {path.name}; what was written before is whole", path.parent):
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
