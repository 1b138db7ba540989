"""The demo: PPO, with what its networks know, rest on and use measured while it trains."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from tdhook_train.attribution import IntegratedGradients
from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import SettingsError
from tdhook_train.health import DeadUnits, DormantUnits, EffectiveRank
from tdhook_train.latent import ActivationPatching, RidgeProbe
from tdhook_train.method import Method
from tdhook_train.observer import Observer, ProbeSet
from tdhook_train.rl.observed_loss import ObservedLoss
from tdhook_train.rl.ppo import Ppo, Progress, make_ppo
from tdhook_train.schedule import At, Every, Geometric, Trigger

__all__ = ["Demo", "Outcome", "methods_for", "observed", "schedule"]


def methods_for(ppo: Ppo) -> dict[str, Method | list[Method]]:
    """The four questions the demo asks of a policy and a value network."""
    policy = {f"action {i} logit": ("logits", i) for i in range(ppo.env.action_spec.shape[-1])}
    action = policy if ppo.discrete else {"action": "action"}
    location = policy if ppo.discrete else {"action location": "loc"}
    velocities = {name: ("observation", i) for i, name in enumerate(ppo.features) if "velocity" in name}
    return {
        "probe": RidgeProbe(target=action | {"value": "state_value"} | velocities),
        "attribution": IntegratedGradients(
            targets=location | {"value": "state_value"}, points=24, rows=64, baseline="mean"
        ),
        "patching": ActivationPatching(targets=action | {"value": "state_value"}, pairs=32),
        "health": [DormantUnits(), DeadUnits(), EffectiveRank()],
    }


def schedule(total_steps: int) -> Trigger:
    """Geometric ticks, close together where training is young, plus one every 2 % of it; about 58 in all."""
    return At(0) | Geometric(first=1, last=total_steps, n=8) | Every(fraction=0.02, total_steps=total_steps)


def observed(ppo: Ppo, into: ArtifactBuffer | str | os.PathLike[str], *, seed: int = 0) -> Observer:
    """Observe a PPO training on its first 2,048 frames, whole trajectories in time order."""
    probe_set = ProbeSet.first(
        ppo.collector, frames=min(2048, ppo.frames_per_batch), feature_names={"observation": ppo.features}
    )
    observer = Observer(methods_for(ppo), when=schedule(ppo.total_steps), into=into, on=probe_set, seed=seed)
    ppo.loss = ObservedLoss(ppo.loss, observer, optimizer=ppo.optimizer)
    return observer


@dataclass(frozen=True)
class Outcome:
    """Where a demo left its evidence, and whether it was interrupted."""

    artifacts: Path
    training: Path
    interrupted: bool


@dataclass
class Demo:
    """Train PPO with live observation.

    Args:
        frames: environment frames.
        env: environment id.
        seed: of torch, the environment and the observer.
        out: folder of the run: ``artifacts``, ``training.csv``.
        overwrite: replace the run that the folder holds.
        progress: show a progress bar.
    """

    frames: int = 50_000
    env: str = "InvertedDoublePendulum-v5"
    seed: int = 0
    out: Path = Path("runs/demo")
    overwrite: bool = False
    progress: bool = True
    _began: float = field(default_factory=time.perf_counter, init=False)

    def run(self) -> Outcome:
        """Train to the end, or to Ctrl-C; either way what was recorded is kept.

        Raises:
            RunExistsError: the folder holds a run and ``overwrite`` is off.
            EnvironmentNameError: no such environment.
            MissingPackageError: it needs a package that is not installed.
        """
        if self.frames < 200:
            raise SettingsError(f"the demo needs at least 200 frames to have trajectories to probe, got {self.frames}")
        ppo = make_ppo(self.env, frames=self.frames, seed=self.seed)
        buffer = ArtifactBuffer(self.out / "artifacts", overwrite=self.overwrite)
        training = self.out / "training.csv"
        with observed(ppo, buffer, seed=self.seed) as observer, training.open("w", newline="") as file:
            try:
                interrupted = self._train(ppo, observer, file)
                observer.finish()
            finally:
                ppo.close()
        return Outcome(buffer.path, training, interrupted)

    def _train(self, ppo: Ppo, observer: Observer, file: TextIO) -> bool:
        columns = ("frames", "step", "seconds", "return", "episodes", "observer_seconds")
        table = csv.DictWriter(file, columns)
        table.writeheader()

        def collected(frames: int) -> None:
            observer.clock.frames = frames

        with self._bar(ppo) as bar:
            try:
                for progress in ppo.train(collected):
                    table.writerow(self._line(progress, observer))
                    file.flush()
                    _show(bar, progress, observer)
            except (KeyboardInterrupt, RuntimeError) as error:
                if not _interrupted(error):
                    raise
                return True
        return False

    @contextmanager
    def _bar(self, ppo: Ppo) -> Iterator[Any]:
        with tqdm(total=ppo.total_frames, unit="frame", unit_scale=True, disable=not self.progress) as bar:
            bar.set_description(f"PPO on {self.env}")
            yield bar

    def _line(self, progress: Progress, observer: Observer) -> dict[str, float]:
        returns = progress.returns
        return {
            "frames": progress.frames,
            "step": progress.steps,
            "seconds": time.perf_counter() - self._began,
            "return": sum(returns) / len(returns) if returns else float("nan"),
            "episodes": len(returns),
            "observer_seconds": observer.meter.spent_s,
        }


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: a block that binds parameters to a module turns it into a RuntimeError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _show(bar: Any, progress: Progress, observer: Observer) -> None:
    bar.update(progress.frames - bar.n)
    mean = f"{sum(progress.returns) / len(progress.returns):.0f}" if progress.returns else "–"
    bar.set_postfix_str(f"return {mean}, observers {observer.meter.share:.1%} of training time")
