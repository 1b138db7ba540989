"""Where the numbers of a report come from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from tdhook_train.errors import KeyMissingError
from tdhook_train.plots.sections.section import Listing, Picture, Section
from tdhook_train.plots.source import read, recorded

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["facts", "section"]

_MOST_EVENTS = 200
_MOST_PRINTS = 3
_HOW = (
    "Fingerprints are 64-bit hashes: of the weights that a row was measured on, and of the batch. One of the data "
    "means that every row of that artifact saw the same states."
)


def facts(buffer: ArtifactBuffer) -> dict[str, str]:
    """Return the run's path, extent and date for the header.

    Raises:
        KeyMissingError: the buffer has no row.
    """
    rows = [artifact for _, artifact in recorded(buffer)]
    if not rows:
        known = ", ".join(repr(name) for name in buffer) or "none"
        raise KeyMissingError(f"{buffer.path} holds no row to report on; artifacts declared: {known}")
    meta = {key: [read(artifact, ("meta", key)) for artifact in rows] for key in ("step", "frames", "time")}
    steps = sorted({int(step) for table in meta["step"] for step in table.steps})
    frames = max(int(table.values.max()) for table in meta["frames"])
    first, last = (pick(float(pick(table.values)) for table in meta["time"]) for pick in (min, max))
    return {
        "run": str(buffer.path),
        "ticks": str(len(steps)),
        "optimizer steps": f"{steps[0]:,} to {steps[-1]:,}",
        "environment frames": f"{frames:,}",
        "measured": f"{datetime.fromtimestamp(first, UTC):%Y-%m-%d %H:%M} UTC, within {_duration(last - first)}",
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def section(buffer: ArtifactBuffer, given: Mapping[str, object]) -> Section:
    """Say what was measured with what, on which weights and data, and what was not.

    Args:
        buffer: the run.
        given: what else is known of it, such as environment and seed.
    """
    pictures = (
        Picture("Run", "", listings=(_run(buffer, given),)),
        Picture("Rows", _HOW, listings=(_rows(buffer),)),
        Picture("What happened meanwhile", "", note=_counts(buffer), listings=_events(buffer)),
        Picture("Settings of the methods", "As they were stored with the rows.", listings=(_settings(buffer),)),
    )
    return Section("Where this comes from", pictures)


def _run(buffer: ArtifactBuffer, given: Mapping[str, object]) -> Listing:
    origin = buffer.origin
    rows = [(name, str(fact)) for name, fact in (facts(buffer) | dict(given)).items()]
    rows += [("begun", str(origin["created"])), ("name of the run", str(origin["run"]))]
    rows += [("attempts", f"{int(origin['attempt']) + 1}")]
    rows += [(f"version of {package}", str(version)) for package, version in origin["versions"].items()]
    return Listing(("what", "value"), rows)


def _rows(buffer: ArtifactBuffer) -> Listing:
    header = ("artifact", "rows", "steps", "weights", "data", "attempts", "seconds")
    return Listing(header, [(name, *_row(artifact)) for name, artifact in recorded(buffer)])


def _row(artifact: Artifact) -> tuple[str, ...]:
    steps = np.asarray(artifact.steps)
    attempts = np.unique(artifact.series(("meta", "attempt")).numpy()) + 1
    return (
        f"{len(steps):,}",
        f"{steps[0]:,} to {steps[-1]:,}",
        _prints(artifact, "weights"),
        _prints(artifact, "data"),
        ", ".join(str(attempt) for attempt in attempts),
        f"{float(artifact.series(('meta', 'cost')).nansum()):.2f}",
    )


def _prints(artifact: Artifact, key: str) -> str:
    words = [int(word) for word in artifact.series(("meta", key))]
    different = list(dict.fromkeys(words))
    shown = [f"{word % 2**64:016x}" for word in different]
    if len(shown) > _MOST_PRINTS:
        shown = [shown[0], "…", shown[-1]]
    return f"{len(different):,}: {' '.join(shown)}"


def _counts(buffer: ArtifactBuffer) -> str:
    counts = Counter(str(event.get("kind")) for event in buffer.events())
    named = {"skip": "ticks skipped", "error": "errors", "mark": "marks", "checkpoint": "checkpoints measured"}
    told = [f"{counts.pop(kind, 0):,} {name}" for kind, name in named.items() if kind != "checkpoint" or counts[kind]]
    told += [f"{count:,} of {kind!r}" for kind, count in counts.items()]
    return ", ".join(told) + "."


def _events(buffer: ArtifactBuffer) -> tuple[Listing, ...]:
    events = [event for event in buffer.events() if event.get("kind") != "checkpoint"]
    if not events:
        return ()
    rows = [_event(event) for event in events[:_MOST_EVENTS]]
    title = f"{len(rows)} of {len(events)} events" if len(events) > len(rows) else f"All {len(events)} events"
    return (Listing(("step", "what", "details"), rows, title),)


def _event(event: Mapping[str, Any]) -> tuple[str, str, str]:
    details = {key: value for key, value in event.items() if key not in ("kind", "step", "run")}
    return str(event.get("step", "")), str(event.get("kind", "")), _text(details)


def _text(details: Mapping[str, Any]) -> str:
    return "; ".join(f"{key}: {value}" for key, value in details.items())


def _settings(buffer: ArtifactBuffer) -> Listing:
    rows: Sequence[tuple[str, str]] = [
        (name, json.dumps(artifact.settings or {}, indent=1, ensure_ascii=False, default=str))
        for name, artifact in recorded(buffer)
    ]
    return Listing(("artifact", "settings"), rows, "Settings, as JSON")
