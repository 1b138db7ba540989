"""Fits of every kind end in the same bits with all callbacks at once as without any."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from small import Net, data, left, loader, same, trainer_for
from tensordict import TensorDict
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tdhook_train import ArtifactBuffer, At
from tdhook_train.attribution import IntegratedGradients
from tdhook_train.callbacks import (
    ActivationCallback,
    AttributionCallback,
    EditCallback,
    HealthCallback,
    ObserverCallback,
    PatchingCallback,
    ProbeCallback,
    SimilarityCallback,
)
from tdhook_train.latent import Ablate
from tdhook_train.method import Method, Seen


@dataclass(frozen=True)
class Draws(Method):
    """A method of a user's own, which draws, leaves gradients, and wakes what sleeps."""

    writes: ClassVar = {"drawn": "", "loss": ""}

    def measure(self, seen: Seen, model: Any) -> TensorDict:
        drawn = torch.rand(()) + torch.rand((), generator=seen.generator)
        model.module.train()
        with torch.enable_grad():
            loss = model.module(seen.batch["input"]).square().mean()
            loss.backward()
        return TensorDict({"drawn": drawn, "loss": loss.detach().float()})


def every(path: Path, **options: Any) -> list[pl.Callback]:
    """One callback of each name; the edit is never due."""
    known = {"every_n_train_steps": 2} | options
    return [
        ProbeCallback("net.*", dirpath=path / "probe", **known),
        AttributionCallback(IntegratedGradients(rows=4, points=4), dirpath=path / "attribution", **known),
        PatchingCallback(["net.0", "net.4"], "output", 4, dirpath=path / "patching", **known),
        HealthCallback(dirpath=path / "health", **known),
        ActivationCallback(keep=3, dirpath=path / "activations", **known),
        SimilarityCallback("net.*", ("initial", "previous", "layers"), dirpath=path / "similarity", **known),
        ObserverCallback(Draws(), dirpath=path / "observer", **known),
        EditCallback(Ablate("net.2", units=1), when=At(10_000), dirpath=path / "edit"),
    ]


def steps(path: Path) -> dict[str, list[int]]:
    found = {}
    for folder in sorted(path.iterdir()):
        with ArtifactBuffer.open(folder) as buffer:
            found |= {name: buffer[name].steps.tolist() for name in buffer}
    return found


class Plain(Net):
    """Adam divides by zero in half precision."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.5)


class Scheduled(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=12)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Adversaries(Net):
    """Two networks against each other, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__(manual=True)
        self.critic = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.1), nn.Linear(4, 1))

    def training_step(self, batch: Any, _: int) -> None:
        self.net[5].eval()
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
            self.toggle_optimizer(optimizer)
            loss = sign * (self.critic(self(batch[0])).mean() - self.critic(batch[1]).mean()).tanh()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        own = [*self.net.parameters(), *self.head.parameters()]
        return [torch.optim.Adam(own, 0.01), torch.optim.SGD(self.critic.parameters(), 0.01)]


class Noisy(Dataset[Any]):
    """Draws noise for what it gives, as augmentation does, from every global generator."""

    def __getitem__(self, index: int) -> Any:
        x, y = data()[index]
        return x + random.random() + float(np.random.rand()) + torch.rand(()), y

    def __len__(self) -> int:
        return 60


def noisy() -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=10, shuffle=True)


def by_a_worker() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=10, shuffle=True, num_workers=1, persistent_workers=True)


EVEN = list(range(0, 13, 2))
KINDS: dict[str, tuple[Any, Any, dict[str, Any], list[int]]] = {
    "plain": (Net, loader, {}, EVEN),
    "noise": (Net, noisy, {}, EVEN),
    "worker": (Net, by_a_worker, {}, EVEN),
    "accumulation": (Net, loader, {"accumulate_grad_batches": 4}, [0, 2, 4]),
    "clipping": (Net, loader, {"gradient_clip_val": 0.1}, EVEN),
    "64-true": (Net, loader, {"precision": "64-true"}, EVEN),
    "bf16-mixed": (Net, loader, {"precision": "bf16-mixed"}, EVEN),
    "bf16-true": (Net, loader, {"precision": "bf16-true"}, EVEN),
    "16-true": (Plain, loader, {"precision": "16-true"}, EVEN),
    "manual": (lambda: Net(manual=True), loader, {}, EVEN),
    "manual, bf16-mixed": (lambda: Net(manual=True), loader, {"precision": "bf16-mixed"}, EVEN),
    "two optimizers": (Adversaries, loader, {}, list(range(0, 25, 2))),  # the trainer counts the steps of both
    "schedule": (Scheduled, loader, {}, EVEN),
}


@pytest.mark.parametrize("on", ["batch", "dataloader"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_ends_in_the_same_bits_with_every_callback(kind, on, tmp_path):
    if kind == "worker" and on == "dataloader":
        pytest.skip("once is enough of what starts processes")
    make, batches, how, expected = KINDS[kind]
    fixed = {} if on == "batch" else {"dataloader": noisy()}

    def fit(name: str, callbacks: list[Any]) -> Any:
        pl.seed_everything(0, verbose=False)
        model, trainer = make(), trainer_for(tmp_path / name, callbacks, **how)
        trainer.fit(model, batches())
        return left(model, trainer)

    bare, watched = fit("bare", []), fit("watched", every(tmp_path / "run", **fixed))
    assert not any(value.isnan().any() for value in bare["weights"].values())
    assert [part for part, value in bare.items() if not same(value, watched[part])] == []
    rows = "probe", "attribution", "patching", "health", "activations", "similarity", "observer"
    assert steps(tmp_path / "run") == dict.fromkeys(sorted(rows), expected)
