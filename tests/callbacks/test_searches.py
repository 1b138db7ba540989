"""Short fits that look for a learning rate or a batch size before the fit: nothing of them is measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from small import Net, data, left, same, trainer_for
from torch.utils.data import DataLoader

from tdhook_train import ArtifactBuffer
from tdhook_train.callbacks import HealthCallback, ProbeCallback


class Searched(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.01, 2

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(data(), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(data(), batch_size=self.batch_size)


class Looks(pl.Callback):
    """Notes what a search left in a folder, before the fit begins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, list[Path]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found += self.folder.glob("*")


def first(search: str, trainer: pl.Trainer, model: Searched) -> None:
    if search == "lr_find":
        Tuner(trainer).lr_find(model, num_training=30, early_stop_threshold=None)
    elif search == "scale_batch_size":
        Tuner(trainer).scale_batch_size(model, init_val=5, max_trials=2, steps_per_trial=1)


def finder(search: str) -> list[Any]:
    if search == "LearningRateFinder":
        return [LearningRateFinder(num_training_steps=30, early_stop_threshold=None)]
    return [BatchSizeFinder(init_val=5, max_trials=2, steps_per_trial=1)] if search == "BatchSizeFinder" else []


SEARCHES = ["lr_find", "scale_batch_size", "LearningRateFinder", "BatchSizeFinder"]


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_measures_nothing_and_the_fit_after_it_everything(search, tmp_path):
    x, y = (part[:20] for part in data().tensors)

    def fit(name: str, watching: list[Any]) -> Any:
        pl.seed_everything(0, verbose=False)
        found, model, looks = finder(search), Searched(), Looks(tmp_path / "run")
        trainer = trainer_for(tmp_path / name, [*watching, *found, looks], max_epochs=3)
        first(search, trainer, model)
        trainer.fit(model)
        assert not looks.found
        return left(model, trainer) | {"lr": model.lr, "batch_size": model.batch_size, "steps": trainer.global_step}

    watching = [
        ProbeCallback("net.*", batch=[x, y], dirpath=tmp_path / "run" / "fixed"),
        HealthCallback(every_n_train_steps=2, dirpath=tmp_path / "run" / "live"),
    ]
    bare, watched = fit("bare", []), fit("watched", watching)
    assert [part for part, value in bare.items() if not same(value, watched[part])] == []
    steps = 90 if search[0] in "lL" else 18  # of a batch size of 2, or 10
    assert (watched["lr"] != 0.01, watched["steps"]) == (steps == 90, steps)
    with ArtifactBuffer.open(tmp_path / "run" / "fixed") as one, ArtifactBuffer.open(tmp_path / "run" / "live") as two:
        by_default = [math.ceil(k * 0.02 * steps - 1e-6) for k in range(51)]
        assert one["probe"].steps.tolist() == sorted(set(by_default))
        assert two["health"].steps.tolist() == list(range(0, steps + 1, 2))
