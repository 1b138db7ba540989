"""A small module and fits of it, with what a training leaves behind."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import ArtifactBuffer


class Net(pl.LightningModule):
    """Dropout, an activation in place, two BatchNorms, one of them frozen."""

    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        first = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.2)
        self.net = nn.Sequential(*first, nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, _: int) -> Tensor | None:
        self.net[5].eval()
        loss = (self(batch[0]) - batch[1]).square().mean()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def data(rows: int = 60) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator)
    return TensorDataset(x, x[:, :1] * 2 + 0.1 * torch.randn(rows, 1, generator=generator))


def loader(*, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=10, shuffle=shuffle)


def trainer_for(tmp_path: Any, callbacks: list[Any], **options: Any) -> pl.Trainer:
    known = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
    }
    return pl.Trainer(**(known | options), callbacks=callbacks)


def fitted(tmp_path: Any, callbacks: list[Any], *, manual: bool = False, **options: Any) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    model, trainer = Net(manual=manual), trainer_for(tmp_path, callbacks, **options)
    trainer.fit(model, loader())
    return left(model, trainer)


def left(model: nn.Module, trainer: pl.Trainer) -> dict[str, Any]:
    """All that a fit leaves behind."""
    return {
        "weights": {key: value.clone() for key, value in model.state_dict().items()},
        "rng": torch.get_rng_state(),
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "others": [random.getstate(), *map(str, np.random.get_state())],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def rows(path: Any, *without: str) -> dict[Any, Any]:
    """Everything that is stored, but when and at what cost."""
    with ArtifactBuffer.open(path) as buffer:
        return {
            (name, key): value.numpy().tobytes()
            for name in buffer
            for key, value in buffer[name][:].items(include_nested=True, leaves_only=True)
            if key[-1] not in ("time", "cost", *without)
        }
