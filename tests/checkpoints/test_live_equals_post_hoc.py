"""A sweep over the checkpoints of a training gives the rows that were recorded while it trained, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from small import Net, data, fitted, loader, trainer_for
from tensordict import TensorDict
from tiny import BATCHES, PER_BATCH, STEPS, make

from tdhook_train import ArtifactBuffer, At, Every, Method, Observer, ProbeSet, sweep
from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.callbacks import (
    ActivationCallback,
    AttributionCallback,
    HealthCallback,
    ObserverCallback,
    PatchingCallback,
    ProbeCallback,
    SimilarityCallback,
)
from tdhook_train.checkpoints import differences
from tdhook_train.health import DeadUnits, DormantUnits, EffectiveRank
from tdhook_train.latent import ActivationCache, ActivationPatching, Cka, LogisticProbe, RidgeProbe
from tdhook_train.rl import ObservedLoss, ObserverHook

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(optimizer|post_loss)' hook stage will be replaced:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@dataclass(frozen=True)
class Draws(Method):
    """Numbers from its generator, and from the global one."""

    writes: ClassVar = {"own": "place", "torchs": "place"}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return TensorDict({"own": torch.rand(3, generator=seen.generator), "torchs": torch.rand(3)})


def swept(checkpoints: Any, build: Any, methods: Any, run: Any, into: Any, **options: Any) -> list[str]:
    """Sweep, and say what differs from the run."""
    sweep(checkpoints, build, methods, run, into, progress=False, **options)
    return differences(run, into)


# ---------------------------------------------------------------------- TorchRL

RL_METHODS = {
    "probe": RidgeProbe(target="action"),
    "attribution": IntegratedGradients(points=4, rows=4),
    "patching": ActivationPatching(targets={"value": "state_value"}, pairs=4),
    "health": [DormantUnits(), DeadUnits(), EffectiveRank()],
    "similarity": Cka(to=("previous", "initial")),
    "draws": Draws(),
}
DUE = At(0) | Every(optim_steps=1)


def saved_at_every_step(trainer: Any, folder: Path) -> None:
    """Save the weights before the first step and after each, and all there is after each batch."""
    steps = [0]

    def save(*_: Any) -> None:
        torch.save({"loss_module": trainer.loss_module.state_dict(), "step": steps[0]}, folder / f"{steps[0]}.pt")

    def count(*_: Any) -> None:
        steps[0] += 1
        save()

    folder.mkdir()
    trainer.register_op("process_optim_batch", lambda _: None if steps[0] else save())
    trainer.register_op("post_optim", count)
    trainer.register_op("post_steps", lambda *_: trainer.checkpoint.save(folder / f"batch_{trainer.collected_frames}"))


def trained(name: str, folder: Path, door: str, on: Callable[[Any], Any]) -> Any:
    trainer = make(name)
    with Observer(RL_METHODS, when=DUE, into=folder / "run", on=on(trainer.collector), seed=3) as observer:
        if door == "hook":
            ObserverHook(observer).register(trainer)
        else:
            ObservedLoss(trainer.loss_module, observer, trainer.optimizer)
        saved_at_every_step(trainer, folder / "ckpt")
        trainer.train()
        observer.finish()
    return lambda: make(name).loss_module


ON = {
    "first frames": lambda collector: ProbeSet.first(collector, frames=18),
    "refreshed": lambda collector: ProbeSet.first(collector, frames=18, refresh=Every(optim_steps=4)),
    "several": lambda collector: {
        "now": ProbeSet.first(collector, frames=18, refresh=Every(optim_steps=4)),
        "first": ProbeSet.first(collector, frames=18),
    },
}


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("door", ["loss", "hook"])
def test_ppo(door, on, tmp_path):
    build = trained("ppo", tmp_path, door, ON[on])
    assert swept(tmp_path / "ckpt", build, RL_METHODS, tmp_path / "run", tmp_path / "after", seed=3) == []
    with ArtifactBuffer.open(tmp_path / "after") as after:
        names = ["probe.now", "probe.first"] if on == "several" else ["probe"]
        for name in names:
            assert len(after[name].steps) > STEPS
            frames = [PER_BATCH * (i + 1) for i in range(BATCHES)] if door == "hook" else [0]
            assert after[name].series(("meta", "frames")).unique().tolist() == frames
        assert len(after[names[0]].series(("meta", "data")).unique()) == (1 if on == "first frames" else 2)


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_sac_and_td3(name, monkeypatch, tmp_path):
    monkeypatch.delitem(RL_METHODS, "patching")  # which asks for a value
    build = trained(name, tmp_path, "hook", ON["first frames"])
    assert swept(tmp_path / "ckpt", build, RL_METHODS, tmp_path / "run", tmp_path / "after", seed=3) == []


def test_other_draws_differ_and_missing_rows_are_said(tmp_path):
    build = trained("ppo", tmp_path, "loss", ON["first frames"])
    checkpoints = [path for path in (tmp_path / "ckpt").iterdir() if path.name not in ("0.pt", "2.pt")]
    methods = {"draws": Draws(), "rank": EffectiveRank()}
    said = swept(checkpoints, build, methods, tmp_path / "run", tmp_path / "after")
    run, after = tmp_path / "run", tmp_path / "after"
    assert {line for line in said if line.startswith(("'draws': ", "'rank'", "'health'"))} == {
        f"'draws': only {run} has rows of step 0, 2",
        f"'health': only {run} has rows of it",
        f"'rank': only {after} has rows of it",
    }
    drawn = ", ".join(f"{name}.{key}" for name in ("actor_network", "critic_network") for key in ("own", "torchs"))
    assert f"'draws', step 1: {drawn} differ" in said  # another seed


# ---------------------------------------------------------------------- Lightning

METHODS: dict[str, Any] = {
    "probe": [RidgeProbe("net.*", target="target")],
    "classes": [LogisticProbe("net.4", target="positive")],
    "attribution": [IntegratedGradients(rows=4, points=4)],
    "saliency": [Saliency()],
    "patching": [ActivationPatching(["net.0", "net.4"], "output", 4)],
    "health": [DormantUnits(), DeadUnits(), EffectiveRank()],
    "similarity": [Cka("net.*", ("initial", "previous", "layers"))],
    "activations": [ActivationCache(rows=3)],
    "draws": [Draws()],
}


def batch() -> dict[str, torch.Tensor]:
    x, y = (part[:40] for part in data().tensors)
    return {"input": x, "target": y, "positive": (y[:, 0] > 0).long()}


class FromTheFirst(ModelCheckpoint):
    """Saves before the first step as well."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            trainer.save_checkpoint(Path(self.dirpath) / "step=0.ckpt")


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_a_fit_in_every_precision(precision, tmp_path):
    callback = ObserverCallback(METHODS, every_n_train_steps=3, batch=batch(), dirpath=tmp_path / "run")
    fitted(tmp_path, [FromTheFirst(tmp_path / "ckpt"), callback], precision=precision)
    context = trainer_for(tmp_path, [], precision=precision).precision_plugin.forward_context
    if precision == "bf16-mixed":
        context = partial(torch.autocast, "cpu", torch.bfloat16)
    assert swept(tmp_path / "ckpt", Net, METHODS, tmp_path / "run", tmp_path / "after", context=context) == []
    with ArtifactBuffer.open(tmp_path / "after") as after:
        assert after["probe"].steps.tolist() == [0, 3, 6, 9, 12]
        assert after["probe"].series(("meta", "epoch")).tolist() == [0, 0, 0, 1, 1]


def test_live_and_averaged_weights(tmp_path):
    callbacks = [
        ObserverCallback(METHODS, every_n_train_steps=3, batch=batch(), weights=weights, dirpath=tmp_path / weights)
        for weights in ("live", "average")
    ]
    fitted(tmp_path, [FromTheFirst(tmp_path / "ckpt"), WeightAveraging(), *callbacks])
    for weights in ("live", "average"):
        after = tmp_path / f"after-{weights}"
        assert swept(tmp_path / "ckpt", Net, METHODS, tmp_path / weights, after, weights=weights) == []


NAMED = {
    "probe": lambda **options: ProbeCallback("net.*", **options),
    "attribution": AttributionCallback,
    "patching": lambda **options: PatchingCallback(["net.0", "net.4"], "output", **options),
    "health": HealthCallback,
    "similarity": lambda **options: SimilarityCallback("net.*", **options),
    "activations": ActivationCallback,
}


def test_every_named_callback(tmp_path):
    known = {"input": batch()["input"], "target": batch()["target"]}
    callbacks = {
        name: make_one(every_n_train_steps=3, batch=known, dirpath=tmp_path / name) for name, make_one in NAMED.items()
    }
    fitted(tmp_path, [FromTheFirst(tmp_path / "ckpt"), *callbacks.values()])
    for name, callback in callbacks.items():
        methods = callback.methods_for(TensorDict(known, [40]))
        assert swept(tmp_path / "ckpt", Net, methods, tmp_path / name, tmp_path / f"after-{name}") == []


def test_a_run_on_batches_of_the_training_cannot_be_measured_again(tmp_path):
    callback = ObserverCallback({"rank": EffectiveRank()}, every_n_train_steps=3, dirpath=tmp_path / "run")
    pl.seed_everything(0, verbose=False)
    trainer_for(tmp_path, [FromTheFirst(tmp_path / "ckpt"), callback]).fit(Net(), loader())
    with pytest.raises(Exception, match=r"run keeps no probe set, since it was measured on batches in training"):
        swept(tmp_path / "ckpt", Net, {"rank": EffectiveRank()}, tmp_path / "run", tmp_path / "after")
