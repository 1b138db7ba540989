"""What live observation costs a PPO training: the demo with and without observers, interleaved in one process.

Two trainings of the same seed, one bare and one observed, take turns in stretches of 10,000 frames over the whole
run, so that both do the same work (the end weights are compared bit by bit) and ticks are met where the schedule puts
them, early and late. Within a pair the order alternates.

    python bench/overhead.py [--frames 50000] [--repeats 1]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.rl.demo import observed
from tdhook_train.rl.ppo import Progress, make_ppo

ENVIRONMENT = "InvertedDoublePendulum-v5"
STRETCH = 10_000


@dataclass
class Training:
    """A training that is advanced stretch by stretch, with random states of its own."""

    frames: int
    into: str | None
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ppo = make_ppo(ENVIRONMENT, frames=self.frames, seed=0)
        self.observer = observed(self.ppo, self.into) if self.into else None
        self._batches: Iterator[Progress] = self.ppo.train(self._collected)
        self._rng = torch.get_rng_state()

    def _collected(self, frames: int) -> None:
        if self.observer is not None:
            self.observer.clock.frames = frames

    def advance(self, frames: int) -> None:
        """Train on, up to ``frames`` in all, and note the seconds it took."""
        torch.set_rng_state(self._rng)
        began = time.perf_counter()
        for progress in self._batches:
            if progress.frames >= frames:
                break
        if self.observer is not None and frames >= self.frames:
            self.observer.finish()
        self.seconds.append(time.perf_counter() - began)
        self._rng = torch.get_rng_state()

    def weights(self) -> torch.Tensor:
        """All parameters, end to end."""
        return torch.cat([p.detach().flatten() for p in self.ppo.loss.parameters()])

    def close(self) -> None:
        """Let go of the environment and the observer."""
        self.ppo.close()
        if self.observer is not None:
            self.observer.close()


def run(frames: int) -> tuple[list[tuple[float, float]], dict[str, float], int]:
    """Return the seconds of each pair of stretches (bare, observed), seconds by method, and the number of ticks."""
    with tempfile.TemporaryDirectory() as folder:
        bare, watched = Training(frames, None), Training(frames, folder)
        for i, until in enumerate(range(STRETCH, frames + 1, STRETCH)):
            for training in (bare, watched) if i % 2 == 0 else (watched, bare):
                training.advance(until)
        if not torch.equal(bare.weights(), watched.weights()):
            raise SystemExit("the observed training ended in other weights: the comparison is void")
        ticks = watched.observer.meter.ticks if watched.observer else 0
        bare.close()
        watched.close()
        with ArtifactBuffer.open(folder) as buffer:
            shares = {name: float(buffer[name].series(("meta", "cost")).sum()) for name in buffer}
    return list(zip(bare.seconds, watched.seconds, strict=True)), shares, ticks


def main() -> None:
    """Print the table that ``bench/README.md`` keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    pairs: list[tuple[float, float]] = []
    costs: list[dict[str, float]] = []
    for _ in range(options.repeats):
        found, shares, ticks = run(options.frames)
        pairs += found
        costs.append(shares)
    bare, watched = (sum(seconds) for seconds in zip(*pairs, strict=True))
    ratios = [b / a for a, b in pairs]
    print(f"machine: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; ", end="")
    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    print(f"pairs of {STRETCH:,} frames: {len(pairs)}; ticks a run: {ticks}\n")
    print("| what | value |\n|---|---|")
    print(f"| wall time observed / bare, whole runs | {watched / bare:.4f} |")
    print(f"| the same, median of pairs | {statistics.median(ratios):.4f} |")
    print(f"| each pair | {', '.join(f'{ratio:.3f}' for ratio in ratios)} |")
    print(f"| seconds bare, a run | {bare / options.repeats:.1f} |")
    for name in costs[0]:
        seconds = sum(cost[name] for cost in costs)
        tick_ms = seconds / ticks / len(costs) * 1e3
        print(f"| {name}: share of bare time, ms a tick | {seconds / bare:.2%}, {tick_ms:.1f} |")


if __name__ == "__main__":
    main()
