"""``tdhook-train demo``: train PPO with observers attached."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tdhook_train.cli.printing import complain, say
from tdhook_train.errors import MissingPackageError

__all__ = ["EXAMPLES", "demo"]

EXAMPLES = (
    "tdhook-train demo",
    "tdhook-train demo --frames 6000 --out runs/short",
)
_NEEDS = ("gymnasium", "pandas", "plotly", "matplotlib")


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
    """
    # torchrl and plotly take seconds to import: after --help and argument errors
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f'the demo needs {", ".join(missing)}, not installed here: pip install "tdhook-train[mujoco,plots]"'
        )
    import pandas as pd

    from tdhook_train.buffer import ArtifactBuffer
    from tdhook_train.plots import score_table, write_report
    from tdhook_train.rl.demo import Demo

    logging.getLogger("torchrl").setLevel(logging.WARNING)  # its notes would tear the progress bar
    outcome = Demo(frames=frames, env=env, seed=seed, out=out, overwrite=overwrite).run()
    with ArtifactBuffer.open(outcome.artifacts, damaged="skip") as buffer:
        if not len(buffer):
            complain("interrupted before anything was recorded")
            raise typer.Exit(130)
        report = write_report(
            buffer, out, training=pd.read_csv(outcome.training), facts={"environment": env, "seed": seed}
        )
        say(score_table(buffer))
    say(report)
    if outcome.interrupted:
        raise typer.Exit(130)
