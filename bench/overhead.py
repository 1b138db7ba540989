"""What live observation costs PPO, SAC and DQN: bare, observed, and observed in the background, in one process.

Three trainings of the same seed take turns in stretches over the whole run, in random order, so that all do the same
work (their end weights are compared bit by bit) and ticks are met where the schedule puts them, early and late. What
the process in the background has not measured when a stretch ends is waited for before the next one begins, so that
it takes no time from the others; that wait is reported.

    python bench/overhead.py [--repeats 1] [--only PPO]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _results import Row, asking, keep
from _trainings import MAKE, Training

from tdhook_train import ArtifactBuffer, Observer, ProbeSet
from tdhook_train.rl import ObservedLoss
from tdhook_train.rl.demo import schedule

FRAMES = {"PPO": 50_000, "SAC": 3_000, "DQN": 8_000}
STRETCHES = 10
SIDES = ("bare", "foreground", "background")


class Side:
    """A training that is advanced stretch by stretch, with random states of its own."""

    def __init__(self, algorithm: str, kind: str, into: Path) -> None:
        self.training: Training = MAKE[algorithm](FRAMES[algorithm])
        self.observer = None if kind == "bare" else observed(self.training, into, background=kind == "background")
        self.seconds: list[float] = []
        self.waited_s = 0.0
        self._batches = self.training.batches()
        self._rng = torch.get_rng_state()

    def advance(self, frames: int) -> None:
        """Train on, up to ``frames`` in all, and note the seconds it took."""
        torch.set_rng_state(self._rng)
        began = time.perf_counter()
        for seen in self._batches:
            if seen >= frames:
                break
        self.seconds.append(time.perf_counter() - began)
        self._rng = torch.get_rng_state()
        if self.observer is not None:
            began = time.perf_counter()
            self.observer.state_dict()  # waits for the background
            self.waited_s += time.perf_counter() - began

    def weights(self) -> torch.Tensor:
        """All parameters, end to end."""
        return torch.cat([p.detach().flatten() for p in self.training.loss.parameters()])

    def close(self) -> None:
        """Let go of the environment and the observer."""
        self.training.collector.shutdown()
        if self.observer is not None:
            self.observer.close()


def observed(training: Training, into: Path, *, background: bool) -> Observer:
    """Observe a training on its first 2,048 frames, at the demo's cadence."""
    probe_set = ProbeSet.first(training.collector, frames=2048)
    observer = Observer(training.methods, when=schedule(training.steps), into=into, on=probe_set, background=background)
    training.loss = ObservedLoss(training.loss, observer, training.optimizer)
    if background:
        for _ in range(2):  # the process starts, and is told what to measure, before anything is timed
            time.sleep(5)
            observer.state_dict()
    return observer


def run(algorithm: str, order: random.Random) -> dict[str, Any]:
    """Run the three sides and return their seconds by stretch, and what the ticks took."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {kind: Side(algorithm, kind, Path(folder) / kind) for kind in SIDES}
        stretch = FRAMES[algorithm] // STRETCHES
        for until in range(stretch, FRAMES[algorithm] + 1, stretch):
            for kind in order.sample(SIDES, len(SIDES)):
                sides[kind].advance(until)
        for kind in SIDES[1:]:
            if not torch.equal(sides["bare"].weights(), sides[kind].weights()):
                raise SystemExit(f"{algorithm} observed in the {kind} ended in other weights: the comparison is void")
        observers = {kind: side.observer for kind, side in sides.items() if side.observer is not None}
        found: dict[str, Any] = {kind: side.seconds for kind, side in sides.items()}
        found["ticks"] = {kind: observer.meter.ticks - observer.meter.dropped for kind, observer in observers.items()}
        found["waited"] = sides["background"].waited_s
        for side in sides.values():
            side.close()
        with ArtifactBuffer.open(Path(folder) / "foreground") as buffer:
            found["costs"] = {name: float(buffer[name].series(("meta", "cost")).sum()) for name in buffer}
    return found


def not_due(calls: int = 20_000) -> float:
    """Return the microseconds that a call of an observed loss takes more than one of the bare loss, nothing due."""

    class Loss(torch.nn.Module):  # costs nothing itself
        convert_to_functional = None

        def __init__(self) -> None:
            super().__init__()
            self.actor_network = torch.nn.Linear(1, 1)

        def forward(self, batch: Any) -> Any:
            return batch

    from tensordict import TensorDict

    from tdhook_train import Every
    from tdhook_train.health import EffectiveRank

    batch = TensorDict(observation=torch.zeros(1, 1), batch_size=[1])
    with tempfile.TemporaryDirectory() as folder:
        bare, watched = Loss(), Loss()
        observer = Observer({"h": EffectiveRank()}, when=Every(optim_steps=10**9), into=folder)
        ObservedLoss(watched, observer)
        took: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(11):
            for which, loss in ((False, bare), (True, watched)):
                began = time.perf_counter()
                for _ in range(calls // 11):
                    loss(batch)
                took[which].append((time.perf_counter() - began) / (calls // 11))
        observer.close()
    return (statistics.median(took[True]) - statistics.median(took[False])) * 1e6


def report(algorithm: str, repeats: int) -> tuple[list[Row], list[str]]:
    """Print one row; return what is kept, and what each row of an artifact took."""
    runs = [run(algorithm, random.Random(seed)) for seed in range(repeats)]
    total = {kind: sum(sum(found[kind]) for found in runs) for kind in SIDES}
    bare = total["bare"] / len(runs)
    ticks = runs[0]["ticks"]
    waited = sum(found["waited"] for found in runs) / len(runs)
    frames = f"{algorithm}, {FRAMES[algorithm]:,} frames"
    ratios = [total[kind] / total["bare"] for kind in SIDES[1:]]
    shown = " | ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"| {frames} | {bare:.1f} | {shown} | {' and '.join(map(str, ticks.values()))} | {waited:.1f} |", flush=True)
    costs = {name: sum(found["costs"][name] for found in runs) / len(runs) for name in runs[0]["costs"]}
    shares = [
        f"| {algorithm}, {name} | {cost / bare:.2%} | {cost / ticks['foreground'] * 1e3:.1f} |"
        for name, cost in costs.items()
    ]
    hows = (("observed", 1.05), ("in the background", 1.02))
    rows = [
        Row(f"{frames}, {how}", "the bare training", ratio, asked)
        for (how, asked), ratio in zip(hows, ratios, strict=True)
    ]
    return rows, shares


def main() -> None:
    """Print the tables, and keep the ratios where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=list(MAKE))
    asking(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| what | " + " | ".join(["bare, s", "foreground / bare", "background / bare", "ticks", "waited, s"]) + " |")
    print("|---|---|---|---|---|---|")
    every = [report(algorithm, options.repeats) for algorithm in ([options.only] if options.only else MAKE)]
    print("\n| row, in the foreground | share of bare time | ms a tick |\n|---|---|---|")
    print("\n".join(share for _, shares in every for share in shares))
    idle = not_due()
    print(f"\na call of an observed loss when nothing is due: {idle:.1f} µs more than of the bare one")
    rows = [row for kept, _ in every for row in kept]
    rows.append(Row("a call of an observed loss, nothing due", "the bare loss", idle, 20, unit="µs more"))
    if options.keep:
        keep(__file__, rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
