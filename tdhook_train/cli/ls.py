"""``tdhook-train ls``: what a run holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdhook_train.cli.printing import Table, clean, say, size
from tdhook_train.cli.runs import Run, opened

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["EXAMPLES", "ls", "one_line"]

EXAMPLES = (
    "tdhook-train ls runs/demo",
    "tdhook-train ls runs/demo | grep probe",
)
_BAD = ("error", "skip")
_LATEST = 5
_BLOCK = 512  # what st_blocks counts


def ls(run: Run) -> None:
    """List what a run holds.

    Its artifacts, with rows, steps, size on disk, dimensions and settings, and its events; the last errors and skips.
    """
    with opened(run) as buffer:
        say(clean(str(buffer.path)))
        if not len(buffer):
            say("no artifact has a row yet")
        else:
            rows = [_line(buffer, name) for name in buffer]
            Table(
                ["artifact", "rows", "steps", "size", "dims", "settings"], rows, text=("artifact", "dims", "settings")
            ).print()
        for line in _events(buffer.events()):
            say(line)


def _line(buffer: ArtifactBuffer, name: str) -> list[str]:
    artifact = buffer[name]
    steps = artifact.steps
    reach = "" if not len(steps) else f"{int(steps[0])}…{int(steps[-1])}" if len(steps) > 1 else str(int(steps[0]))
    taken = size(_on_disk(buffer.path / name))
    return [name, str(len(steps)), reach, taken, _dims(artifact), one_line(artifact.settings)]


def _on_disk(folder: Path) -> int:
    return sum(file.stat().st_blocks * _BLOCK for file in folder.rglob("*") if file.is_file())


def _dims(artifact: Artifact) -> str:
    sizes = {
        dim: length
        for column in artifact.schema.columns.values()
        for dim, length in zip(column.dims, column.shape, strict=True)
    }
    return " ".join(f"{dim}={length}" for dim, length in sizes.items())


def one_line(settings: Any) -> str:
    """Return the settings of an artifact as one line: the method's name, then each setting."""
    if isinstance(settings, list):
        return " + ".join(map(one_line, settings))
    if not isinstance(settings, Mapping):
        return "" if settings is None else json.dumps(settings, ensure_ascii=False)
    named = {name: value for name, value in settings.items() if name != "method"}
    said = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in named.items()]
    return " ".join([str(settings["method"]), *said] if "method" in settings else said)


def _events(events: list[dict[str, Any]]) -> list[str]:
    """Return how many events of each kind there are, and the latest of those that say that something is missing."""
    if not events:
        return []
    counts = Counter(str(event.get("kind")) for event in events)
    lines = ["", "events: " + ", ".join(f"{count} {clean(kind)}" for kind, count in counts.items())]
    bad = [event for event in events if event.get("kind") in _BAD]
    return lines + [f"  {_told(event)}" for event in bad[-_LATEST:]]


def _told(event: Mapping[str, Any]) -> str:
    said = [str(event[name]) for name in ("row", "path", "why", "detail", "error") if event.get(name) not in (None, "")]
    step = event.get("step")
    moment = "" if step in (None, -1) else f" at step {step}"
    return clean(f"{event['kind']}{moment}: {' · '.join(said)}")
