"""``tdhook-train report``: the page of one run or several."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer

from tdhook_train.cli.printing import say
from tdhook_train.cli.runs import RUN, labels_of, opened
from tdhook_train.errors import KeyMissingError

__all__ = ["EXAMPLES", "report"]

EXAMPLES = (
    "tdhook-train report runs/mine",
    "tdhook-train report runs/seed0 runs/seed1 runs/seed2 --out report",
)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help=RUN, show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; that of the (first) run by default.", show_default=False)
    ] = None,
) -> None:
    """Write the report of a run, or of several together.

    Leaves report.html and report.png; also while the run is still training. The last line printed
    is the report's path.
    """
    from tdhook_train.plots import score_table, write_report

    into = runs[0] if out is None else out
    with ExitStack() as stack:
        buffers = [stack.enter_context(opened(run)) for run in runs]
        if len(buffers) > 1:
            path = write_report(dict(zip(labels_of(runs), buffers, strict=True)), into)
        else:
            path = write_report(buffers[0], into)
            with suppress(KeyMissingError):  # a run without a probe has no scores
                say(score_table(buffers[0]))
    say(path)
