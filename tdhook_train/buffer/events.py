"""What happened during a run, one JSON object a line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from tdhook_train.buffer.declaration import plain
from tdhook_train.buffer.disk import disk_errors

__all__ = ["EVENTS", "mend", "read", "write"]

EVENTS = "events.jsonl"


def write(folder: Path, event: dict[str, Any]) -> None:
    """Append one event in a single call, so that readers see it whole or not at all."""
    line = json.dumps(plain(event, f"event {event.get('kind')!r}")) + "\n"
    fd = os.open(folder / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with disk_errors("no room for an event", folder):
            before = os.fstat(fd).st_size
            if os.write(fd, line.encode()) < len(line):  # what there was room for would spoil the next one
                os.ftruncate(fd, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(fd)


def mend(folder: Path) -> None:
    """End a last line that a killed writer left open, so that the next event gets a line of its own."""
    path = folder / EVENTS
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read(folder: Path, kind: str | None) -> list[dict[str, Any]]:
    """Return the events of a kind, or all, in the order they were written; torn lines are left out."""
    path = folder / EVENTS
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    events = [event for line in lines if (event := _parse(line)) is not None]
    return [event for event in events if kind is None or event.get("kind") == kind]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
