"""``tdhook-train watch``: a training that runs in another process, as a table that is kept up to date."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdhook_train.cli.printing import Table, on_terminal, say
from tdhook_train.cli.runs import Run, opened

if TYPE_CHECKING:
    from torch import Tensor

    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["EXAMPLES", "lines", "states", "watch"]

EXAMPLES = (
    "tdhook-train watch runs/demo",
    "tdhook-train watch runs/demo --every 10",
    "tdhook-train watch runs/demo --once | grep r2",
)
_KEYS = 6  # of an artifact
_COURSE = 16  # rows whose course is drawn
_BARS = "▁▂▃▄▅▆▇█"


def watch(
    run: Run,
    every: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, for pipes.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Go on after the training has ended.")] = False,
) -> None:
    """Watch a training from another terminal.

    Each value is the mean over all but the steps. Ends with Ctrl-C, or when no process of this machine writes the
    run.
    """
    with opened(run) as buffer:
        looks = states(buffer, None if once else every, (lambda _: False) if follow else _is_over)
        if once or not on_terminal():
            said = ""
            for table in looks:
                if (text := table.plain()) != said:
                    say(text)
                    said = text
            return
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            for table in looks:
                live.update(table.rich(), refresh=True)
    say("the run is over")


def _is_over(path: Path) -> bool:
    from tdhook_train.buffer.lock import writer_of

    return writer_of(path) is None


def states(
    buffer: ArtifactBuffer,
    every: float | None,
    is_over: Callable[[Path], bool],
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[Table]:
    """Yield what a run holds, again and again until it is over.

    Args:
        buffer: a run, open for reading.
        every: seconds between two looks; None for a single one.
        is_over: whether nobody writes there any more.
        wait: how to let time pass.
    """
    while True:
        over = every is None or is_over(buffer.path)  # asked first: nothing comes after the look that follows
        head = ["key", "rows", "step", "first", "last", "course"]
        yield Table(head, lines(buffer), text=("key", "course"))
        if over or every is None:
            return
        wait(every)


def lines(buffer: ArtifactBuffer) -> list[list[str]]:
    """Return a line a key: rows, last step, first and last mean, and the course of the last rows."""
    return [line for name in buffer for line in _of(name, buffer[name])]


def _of(name: str, artifact: Artifact) -> Iterator[list[str]]:
    columns = artifact.schema.columns
    shown = [key for key, column in columns.items() if key[0] != "meta" and column.dtype.is_floating_point]
    shown = [key for key in shown if "batch" not in _last_parts(columns[key].dims)][:_KEYS]
    rows = artifact.last(_COURSE, keys=[*shown, ("meta", "step")])
    if not len(rows):
        return
    first, count = artifact.first(1, keys=shown), str(len(artifact))
    step = str(int(rows["meta", "step"][-1]))
    if not shown:
        yield [name, count, step, "", "", ""]
    for key in shown:
        course = [_mean(value) for value in rows[key]]
        numbers = [f"{value:.4g}" for value in (_mean(first[key]), course[-1])]
        yield [f"{name}/{'.'.join(key)}", count, step, *numbers, _drawn(course)]


def _last_parts(dims: tuple[str, ...]) -> set[str]:
    return {dim.rsplit(".", 1)[-1] for dim in dims}


def _mean(value: Tensor) -> float:
    finite = value[value.isfinite()].double()
    return float(finite.mean()) if finite.numel() else float("nan")


def _drawn(course: list[float]) -> str:
    known = [value for value in course if value == value]
    if not known:
        return ""
    low, reach = min(known), max(known) - min(known)
    places = [0.5 if reach == 0 else (value - low) / reach for value in course]
    return "".join(" " if place != place else _BARS[min(7, int(place * 8))] for place in places)
