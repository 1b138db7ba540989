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
        looks = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten()
        self.net = nn.Sequential(*looks, nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def holes(td):  # in the shapes of the digits
    return torch.tensor([1.0, 0, 0, 0, 0, 0, 1, 0, 2, 1])[td["target"]]


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits")
pl.seed_everything(0, verbose=False)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
data = TensorDataset(images.float().div(16).view(-1, 1, 8, 8), labels)
fixed = {"batch": data[:500], "every_n_train_steps": 40}  # the same images at every measurement
classes = [("output", number) for number in range(10)]
callbacks = [
    ProbeCallback(["net.5", "net.6", "net.7"], target={"holes": holes}, dirpath=folder / "probe", **fixed),
    AttributionCallback(IntegratedGradients(classes, rows=100), dirpath=folder / "attribution", **fixed),
    HealthCallback("net.*", dirpath=folder / "health", report=True, **fixed),
]
trainer = pl.Trainer(max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks)
trainer.fit(Reader(), DataLoader(data, batch_size=64, shuffle=True))

with ArtifactBuffer.open(folder / "probe") as buffer:
    r2 = buffer["probe"].to_xarray().r2.sel(layer="net.6", target="holes")
    print("R² of the number of holes before the last layer:", r2.values.round(2), "at steps", r2.step.values)
with ArtifactBuffer.open(folder / "attribution") as buffer:
    maps = buffer["attribution"].series(("attr", "input"))  # step, image, class, channel, height, width
    true = maps[:, torch.arange(100), labels[buffer["attribution"].coords["batch"]]].sum((2, 3, 4)).mean(1)
    print("logits that the true class gains from its image:", [round(float(value), 1) for value in true])
print(folder / "health" / "report.html")
