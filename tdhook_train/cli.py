"""The command line: ``tdhook-train``."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from tdhook_train.errors import KeyMissingError, TdhookTrainError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Interpretability while a network trains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Interpretability while a network trains."""


@app.command()
def demo(
    frames: Annotated[int, typer.Option(help="Environment frames to train on.")] = 50_000,
    env: Annotated[str, typer.Option(help="Gymnasium environment id.")] = "InvertedDoublePendulum-v5",
    seed: Annotated[int, typer.Option(help="Seed of torch, the environment and the observers.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that the folder holds.")] = False,
) -> None:
    """Train PPO and watch, live, what its policy and value networks know.

    Leaves OUT/artifacts (the evidence), OUT/training.csv, OUT/report.html and OUT/report.png; the last line printed
    is the report's path. Ctrl-C keeps what was recorded and still writes the report.

    Example: tdhook-train demo --frames 6000 --out runs/short
    """
    # torchrl and plotly take seconds to import: after --help and argument errors
    import pandas as pd

    from tdhook_train.buffer import ArtifactBuffer
    from tdhook_train.plots import score_table, write_report
    from tdhook_train.rl.demo import Demo

    logging.getLogger("torchrl").setLevel(logging.WARNING)  # its notes would tear the progress bar
    outcome = Demo(frames=frames, env=env, seed=seed, out=out, overwrite=overwrite).run()
    with ArtifactBuffer.open(outcome.artifacts, damaged="skip") as buffer:
        if not len(buffer):
            typer.echo("interrupted before anything was recorded", err=True)
            raise typer.Exit(130)
        report = write_report(
            buffer, out, training=pd.read_csv(outcome.training), facts={"environment": env, "seed": seed}
        )
        typer.echo(score_table(buffer))
    typer.echo(report)
    if outcome.interrupted:
        raise typer.Exit(130)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run: what the observer was given as into=.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; the run's own by default.")] = None,
) -> None:
    """Write report.html and report.png of a run of your own, also while it is still training.

    The last line printed is the report's path.

    Example: tdhook-train report runs/mine
    """
    from tdhook_train.buffer import ArtifactBuffer
    from tdhook_train.plots import score_table, write_report

    with ArtifactBuffer.open(run, damaged="skip") as buffer:
        path = write_report(buffer, run if out is None else out)
        with suppress(KeyMissingError):  # a run without a probe has no scores
            typer.echo(score_table(buffer))
    typer.echo(path)


def main() -> None:
    """Run the command line; errors of ours are one line, not a traceback."""
    try:
        app()
    except TdhookTrainError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
