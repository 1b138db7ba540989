"""What a sweep over checkpoints costs: each against loading alone, and two processes against one.

python bench/sweep.py [--checkpoints 100] [--frames 50000]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _results import Row, asking, keep
from torch import nn

from tdhook_train import ProbeSet, sweep
from tdhook_train.checkpoints import differences, read
from tdhook_train.checkpoints.fitting import fit
from tdhook_train.rl.demo import methods_for
from tdhook_train.rl.ppo import Ppo, make_ppo

ENVIRONMENT = "InvertedDoublePendulum-v5"
ROUNDS = 2


def saved(folder: Path, checkpoints: int, frames: int) -> tuple[Ppo, ProbeSet]:
    """Train the demo's agent, and save its loss as many times as asked, evenly, with the optimizer beside it."""
    ppo = make_ppo(ENVIRONMENT, frames=frames)
    probe_set = ProbeSet.first(
        ppo.collector, frames=min(2048, ppo.frames_per_batch), feature_names={"observation": ppo.features}
    )
    every, taken = max(ppo.total_steps // checkpoints, 1), [0]

    def save(*_: Any) -> None:
        taken[0] += 1
        if taken[0] % every == 0 and taken[0] <= every * checkpoints:
            states = {"loss_module": ppo.loss.state_dict(), "optimizer": ppo.optimizer.state_dict(), "step": taken[0]}
            torch.save(states, folder / f"{taken[0]}.pt")

    ppo.optimizer.register_step_post_hook(save)
    for _ in ppo.train():
        pass
    ppo.close()
    return ppo, probe_set


def build() -> nn.Module:
    """Make the loss, as it was trained."""
    ppo = make_ppo(ENVIRONMENT, frames=64)
    ppo.close()
    return ppo.loss


def loading(folder: Path, model: nn.Module) -> float:
    """Read every checkpoint into a model once, and nothing else; the seconds."""
    began = time.perf_counter()
    for path in folder.iterdir():
        fit(model, read(path).state, path)
    return time.perf_counter() - began


def swept(folder: Path, checkpoints: int, frames: int) -> tuple[int, dict[str, float]]:
    """Return how many checkpoints there were, and the best seconds of each side, which take turns."""
    (folder / "ckpt").mkdir()
    ppo, probe_set = saved(folder / "ckpt", checkpoints, frames)
    over = partial(sweep, folder / "ckpt", build, methods_for(ppo), probe_set, progress=False, overwrite=True)
    seconds: dict[str, list[float]] = {"loading": [], "one": [], "two": []}
    model = build()
    for _ in range(ROUNDS):
        seconds["loading"].append(loading(folder / "ckpt", model))
        for name, workers in (("one", 1), ("two", 2)):
            began = time.perf_counter()
            over(folder / name, workers=workers)
            seconds[name].append(time.perf_counter() - began)
    assert differences(folder / "one", folder / "two") == []
    return len(os.listdir(folder / "ckpt")), {name: min(times) for name, times in seconds.items()}


def main() -> None:
    """Measure, and print what is kept."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--checkpoints", type=int, default=100)
    asked.add_argument("--frames", type=int, default=50_000)
    asking(asked)
    options = asked.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        many, best = swept(Path(folder), options.checkpoints, options.frames)
    print(f"{many} checkpoints; ms each: " + ", ".join(f"{name} {1e3 * s / many:.1f}" for name, s in best.items()))
    alone = Row("a checkpoint of the demo, four methods", "loading alone", best["one"] / best["loading"], 4)
    both = Row(f"{many} checkpoints, one process", "two processes", best["one"] / best["two"], 1.7, "more")
    for row in (alone, both):
        print(f"{row.what} beside {row.against}: {row.value:.2f} (asked for: {row.asked:g})")
    if options.keep:
        keep(__file__, [alone, both], threads=1)


if __name__ == "__main__":
    main()
