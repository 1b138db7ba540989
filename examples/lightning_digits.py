"""A CNN learns to read digits: when it knows of their holes, what the true class rests on, which units sleep."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import ArtifactBuffer
from tdhook_train.attribution import IntegratedGradients
from tdhook_train.callbacks import AttributionCallback, HealthCallback, ProbeCallback


class Reader(pl.LightningModule):
    def __init__(self):
        super().__init__()
        convolutions = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()
        self.net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def holes(td):  # in the shape of the digit: 0, 6 and 9 have one, 8 has two
    return torch.tensor([1.0, 0, 0, 0, 0, 0, 1, 0, 2, 1])[td["target"]]


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits")
pl.seed_everything(0, verbose=False)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).div(16)[:, None]
data = TensorDataset(images, torch.tensor(digits.target))
fixed = {"batch": data[:500], "every_n_train_steps": 40}  # the same images at every measurement
callbacks = [
    ProbeCallback(["net.5", "net.6", "net.7"], target={"holes": holes}, dirpath=folder / "probe", **fixed),
    AttributionCallback(
        IntegratedGradients([("output", c) for c in range(10)], rows=100), dirpath=folder / "attribution", **fixed
    ),
    HealthCallback("net.*", dirpath=folder / "health", report=True, **fixed),
]
trainer = pl.Trainer(max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks)
trainer.fit(Reader(), DataLoader(data, batch_size=64, shuffle=True))

with ArtifactBuffer.open(folder / "probe") as buffer:
    probe = buffer["probe"].to_xarray()
    for step, r2 in zip(probe.step.values, probe.r2.sel(layer="net.6").values[:, 0], strict=True):
        print(f"step {step}: R² of the number of holes, before the last layer: {r2:.2f}")
with ArtifactBuffer.open(folder / "attribution") as buffer:
    maps = buffer["attribution"].series(("attr", "input"))  # step, image, class, channel, height, width
    images_, steps = buffer["attribution"].coords["batch"], buffer["attribution"].steps.tolist()
    true = maps[:, torch.arange(100), data.tensors[1][images_]].sum((2, 3, 4))  # of the class that each image has
    print("the true class gains from its image, in logits:", dict(zip(steps, true.mean(1).round(decimals=1).tolist())))
print(folder / "health" / "report.html")
