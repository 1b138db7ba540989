"""A CNN learns real images: when it knows of a concept, what the true class rests on, which units sleep."""

import gzip
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import ArtifactBuffer
from tdhook_train.attribution import IntegratedGradients
from tdhook_train.callbacks import AttributionCallback, HealthCallback, ProbeCallback

FASHION = Path(
    "/usr/share/datasets/fashion-mnist"
)  # Debian's package dataset-fashion-mnist; else scikit-learn's digits


class Reader(pl.LightningModule):
    def __init__(self):
        super().__init__()
        looks = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        self.net = nn.Sequential(*looks, nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/images")
fashion = FASHION.is_dir() and "digits" not in sys.argv
pl.seed_everything(0, verbose=False)
raw = [np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in sorted(FASHION.glob("t10k*"))]
pixels, labels = (raw[0][16:] / 255, raw[1][8:]) if fashion else load_digits(return_X_y=True)
side, known = (28, [1.0, 0, 1, 0, 1, 0, 1, 0, 0, 0]) if fashion else (8, [1.0, 0, 0, 0, 0, 0, 1, 0, 2, 1])
data = TensorDataset(torch.tensor(pixels).float().view(-1, 1, side, side), torch.tensor(labels).long())
concept = {"concept": lambda td: torch.tensor(known)[td["target"]]}  # sleeves of clothes, or holes of digits
true_class = {"true class": lambda td: td["output"].gather(1, td["target"][:, None])[:, 0]}
fixed = {"batch": data[:500], "every_n_train_steps": 40}  # the same images at every measurement
callbacks = [
    ProbeCallback(["net.6", "net.7", "net.8"], target=concept, dirpath=folder / "probe", **fixed),
    AttributionCallback(IntegratedGradients(true_class, rows=100), dirpath=folder / "attribution", **fixed),
    HealthCallback("net.*", dirpath=folder / "health", report=True, **fixed),
]
trainer = pl.Trainer(max_steps=180, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks)
trainer.fit(Reader(), DataLoader(data, 64, shuffle=True))
r2 = ArtifactBuffer.open(folder / "probe")["probe"].to_xarray().r2.sel(layer="net.7", target="concept")
print("R² of the concept before the last layer:", r2.values.round(2), "at steps", r2.step.values)
rests = ArtifactBuffer.open(folder / "attribution")["attribution"].series(("attr", "input")).sum((2, 3, 4)).mean(1)
print("logits that the true class gains from its image:", rests.numpy().round(1))
print(folder / "health" / "report.html")
