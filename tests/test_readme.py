"""Every Python block of the README runs as it is written, on trainings and models that stand for the reader's."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tensordict import TensorDict
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchrl.objectives import ClipPPOLoss

from tdhook_train import ArtifactBuffer, Every, HookedModel, Observer, ProbeSet, attribution
from tdhook_train.callbacks import ObserverCallback
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import Cka, RidgeProbe
from tdhook_train.rl import ObservedLoss
from tdhook_train.rl.ppo import make_ppo

ROOT = Path(__file__).parents[1]
BLOCKS = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["blocks"](ROOT / "README.md")
TRAINED = "...  # train as ever\n"
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

Names = dict[str, Any]


def ppo() -> Names:
    """A PPO, and ``train`` in place of what the reader has there."""
    made = make_ppo("InvertedDoublePendulum-v5", frames=2_100, seed=0, frames_per_batch=2_100)

    def train(loss: nn.Module) -> None:
        made.loss = loss
        list(made.train())

    parts = {"collector": made.collector, "actor": made.actor, "critic": made.critic, "optimizer": made.optimizer}
    return {**parts, "ClipPPOLoss": ClipPPOLoss, "train": train}


class Fitted(pl.LightningModule):
    """A network that is fitted to the speed of what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.net(input)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1][:, None])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


def data() -> TensorDataset:
    x = torch.randn(256, 4)
    return TensorDataset(x, x[:, 0] * x[:, 1])


def seeds() -> Names:
    """Five runs in which ``net.3`` learns an angle before a speed."""
    for seed in range(5):
        torch.manual_seed(seed)
        model, x = Fitted(), torch.randn(200, 4)
        td = TensorDict(input=x, angle=x[:, 0], speed=x[:, 1], traj=torch.arange(200) // 20, batch_size=[200])
        methods = {"probe": RidgeProbe(target=["angle", "speed"]), "health": EffectiveRank()}
        when, on = Every(optim_steps=1), ProbeSet(td, groups="traj")
        with Observer(methods, when=when, into=f"runs/{seed}", on=on) as observer:
            for step in range(1, 13):
                with torch.no_grad():  # reads the angle from step 3 on, the speed from step 8
                    first = torch.zeros(16, 4)
                    first[:, 0], first[:, 1] = float(step >= 3), float(step >= 8) * torch.linspace(-1, 1, 16)
                    model.net[0].weight.copy_(first + 1e-4 * torch.randn(16, 4))
                observer.step(model, step=step)
    return {f"run{seed}": ArtifactBuffer.open(f"runs/{seed}") for seed in (0, 1)}


def read() -> Names:
    return {**seeds(), "buffer": ArtifactBuffer.open("runs/mine")}


def images() -> Names:
    def trainer(**how: Any) -> pl.Trainer:
        return pl.Trainer(**QUIET, enable_checkpointing=False, **how)

    return {"images": torch.randn(64, 4), "labels": torch.randn(64), "Trainer": trainer}


def stream() -> Names:
    return {"TensorDict": TensorDict, "hidden": torch.randn(8, 16), "step": 3, "loss": 0.5, "png": b"a picture"}


def checkpoints() -> Names:
    """A fit that was observed, and what it saved."""
    methods = {"probe": RidgeProbe(target="speed"), "similarity": Cka()}
    rows = TensorDict(input=data()[:][0], speed=data()[:][1], batch_size=[256])
    live = ObserverCallback(methods, every_n_train_steps=4, batch=rows, dirpath="runs/live", log_metrics=False)
    saved = ModelCheckpoint("checkpoints", every_n_train_steps=4, save_top_k=-1)
    pl.Trainer(**QUIET, max_epochs=1, callbacks=[live, saved]).fit(Fitted(), DataLoader(data(), 32))
    return {"make_model": Fitted}


def by_hand() -> Names:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))
    return {"model": model, "x": torch.randn(6, 4), "TensorDict": TensorDict, **vars(attribution)}


class Layered(nn.Module):
    """A network with layers by number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.layers(input)


def inside() -> Names:
    td = TensorDict(input=torch.randn(6, 4), batch_size=[6])
    return {"HookedModel": HookedModel, "model": Layered(), "td": td}


def rows_of_a_run(found: Names) -> None:
    assert ArtifactBuffer.open("runs/mine")["probe"].steps.tolist() == [0, 100, 200, 300, 320]


def fit(found: Names) -> None:
    found["trainer"].fit_loop.max_epochs = 1
    sets = TensorDataset(torch.randn(256, 4), torch.randn(256))
    found["trainer"].fit(Fitted(), DataLoader(sets, 2))
    assert ArtifactBuffer.open("tdhook/probe")["probe"].steps.tolist() == [0, 100, 128]
    assert len(ArtifactBuffer.open("tdhook/health")["health"]) > 0


def edited(found: Names) -> None:
    """The observer of this block watches a loss, too."""
    made = make_ppo("InvertedDoublePendulum-v5", frames=1_300, seed=0, frames_per_batch=1_300)
    made.loss = ObservedLoss(made.loss, found["observer"], made.optimizer)
    list(made.train())
    found["observer"].close()
    assert len(ArtifactBuffer.open("runs/changed")["health"]) >= 1  # what the process has no time for is left out


def swept(found: Names) -> None:
    assert found["buffer"]["probe"].steps.tolist() == [4, 8]


def learned(found: Names) -> None:
    order = found["onsets"]["net.3"].unstack("target")
    assert (order["angle"] < order["speed"]).all()


def nothing(_: Names) -> None: ...


BEFORE_AND_AFTER: dict[str, tuple[Callable[[], Names], Callable[[Names], None]]] = {
    "loss = ObservedLoss(": (ppo, rows_of_a_run),
    "plots.heat(": (read, nothing),
    "edits={": (dict, edited),
    "ProbeCallback(": (images, fit),
    'probe.series("r2")': (dict, nothing),
    "buffer.declare(": (stream, nothing),
    "sweep(": (checkpoints, swept),
    "emergence_table(": (dict, learned),
    'td["attr", "input"]': (by_hand, nothing),
    "hooked.run(": (inside, nothing),
}
"""What stands for the reader's own, and what must hold afterwards, by what only that block says."""


@pytest.mark.filterwarnings("ignore")  # of what Lightning and TorchRL say of short trainings
def test_the_blocks_of_the_readme_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", page)
    for number, text in enumerate(BLOCKS):
        (said,) = [said for said in BEFORE_AND_AFTER if said in text]
        before, after = BEFORE_AND_AFTER[said]
        vars(page).update(before())
        source = text.replace(TRAINED, "train(loss)\n")
        exec(compile(source, f"README.md, block {number}", "exec", dont_inherit=True), vars(page))
        after(vars(page))


def test_every_block_is_thought_of():
    assert sum(TRAINED in text for text in BLOCKS) == 1
    for said in BEFORE_AND_AFTER:
        assert sum(said in text for text in BLOCKS) == 1, said
    assert len(BLOCKS) == len(BEFORE_AND_AFTER)
