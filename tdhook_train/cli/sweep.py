"""``tdhook-train sweep``: checkpoints, measured after the fact."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tdhook_train.cli.named import Named
from tdhook_train.cli.printing import say
from tdhook_train.cli.runs import folder_of
from tdhook_train.errors import KeyMissingError, SettingsError, TdhookTrainError, UserCodeError

__all__ = ["EXAMPLES", "sweep"]

EXAMPLES = (
    "tdhook-train sweep 'ckpt/*.pt' --build model.py:make --methods probes.py:METHODS \\",
    "    --data probe_set.pt --into runs/a",
    "tdhook-train sweep ckpt --build my.models:make --methods my.probes:methods \\",
    "    --data runs/live --into runs/a --workers 2",
    r"tdhook-train sweep ckpt --step '_(\d+)\.pt' --on-error skip ...",
)


class Weights(StrEnum):
    """Which weights of a checkpoint."""

    live = "live"
    average = "average"


class OnError(StrEnum):
    """What a checkpoint that cannot be used does to the sweep."""

    stop = "raise"
    warn = "warn"
    skip = "skip"


def sweep(  # noqa: PLR0913 - as many as the function has
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CHECKPOINTS", help="Files, folders (searched in depth), or globs.", show_default=False),
    ],
    build: Annotated[
        str, typer.Option(help="Function that makes the model: package.module:name or file.py:name.", metavar="NAME")
    ],
    methods: Annotated[
        str, typer.Option(help="What to measure: a mapping of names to methods, or a function that gives one.")
    ],
    data: Annotated[Path, typer.Option(help="What to measure on: a file of ProbeSet.save, or the folder of a run.")],
    into: Annotated[Path, typer.Option(help="Folder of the run to make, or to go on with.")],
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    step: Annotated[
        str | None, typer.Option(help="Regular expression whose first group is the step in a path.", show_default=False)
    ] = None,
    weights: Annotated[Weights, typer.Option(help="The trained ones, or their running average.")] = Weights.live,
    part: Annotated[
        str | None, typer.Option(help="Entry of a checkpoint that holds the weights.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what methods draw.")] = 0,
    on_error: Annotated[OnError, typer.Option(help="What is done about what cannot be used.")] = OnError.stop,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Let checkpoints run whatever they ask for: only those you trust.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that INTO holds.")] = False,
) -> None:
    """Measure every checkpoint of a training.

    By the methods that measure it while it runs, and with the same numbers.

    An interrupted sweep goes on where it stopped: checkpoints that are done are left out. The last line printed is
    the folder of the run.
    """
    make, named = Named(build, "--build"), _methods(methods)
    make.load()
    given = _data(data)
    from tdhook_train.checkpoints import sweep as measure

    options: dict[str, Any] = {"workers": workers, "step": step, "weights": weights.value, "part": part, "seed": seed}
    options |= {"on_error": on_error.value, "allow_pickle": allow_pickle, "overwrite": overwrite}
    try:
        measure(checkpoints, make, named, given, into, progress=sys.stderr.isatty(), **options)
    except TdhookTrainError:
        raise
    except Exception as error:
        noted = [note for note in getattr(error, "__notes__", ()) if note.startswith("while ")]
        if not noted:
            raise
        raise UserCodeError(f"{type(error).__name__}: {error}, {noted[0]}; --traceback shows where") from error
    say(into)


def _methods(given: str) -> Mapping[str, Any]:
    named = Named(given, "--methods")
    found = named.load()
    found = named() if callable(found) and not isinstance(found, Mapping) else found
    if not isinstance(found, Mapping):
        raise SettingsError(
            f"--methods {given!r} gives a {type(found).__name__}, expected a mapping of names to methods"
        )
    return found


def _data(given: Path) -> Any:
    if given.is_dir():
        return folder_of(given)
    if not given.is_file():
        raise KeyMissingError(f"--data {given} does not exist; give a file of ProbeSet.save, or the folder of a run")
    from tdhook_train.observer import ProbeSet

    try:
        return ProbeSet.load(given)
    except TdhookTrainError:
        raise
    except Exception as error:  # whatever torch says of a file that is another
        raise SettingsError(f"--data {given} is no file of ProbeSet.save: {type(error).__name__}") from error
