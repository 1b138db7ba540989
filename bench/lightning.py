"""What the callbacks cost a fit: bare and with each example's callbacks, in turns, in one process.

python bench/lightning.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import itertools
import logging
import platform
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train.callbacks import (
    AttributionCallback,
    HealthCallback,
    ObserverCallback,
    PatchingCallback,
    ProbeCallback,
)
from tdhook_train.health import EffectiveRank
from tdhook_train.schedule import Every

ROWS, EPOCHS = 20_000, 8


class Net(pl.LightningModule):
    """A regressor of three hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16, 64, 64, 64]
        layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
        self.net = nn.Sequential(*layers, nn.Linear(64, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """Squared error."""
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 1e-3)


def fitted(callbacks: list[Any]) -> tuple[float, torch.Tensor]:
    """Fit, and return the seconds and the weights."""
    pl.seed_everything(0, verbose=False)
    x = torch.randn(ROWS, 16)
    data = TensorDataset(x, x[:, :1] * x[:, 1:2])
    model = Net()
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=callbacks, **quiet)
    began = time.perf_counter()
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    return time.perf_counter() - began, torch.cat([p.detach().flatten() for p in model.parameters()])


def callbacks_of(kind: str, folder: str) -> list[Any]:
    """Make the callbacks of one side, at the default cadence; none for ``bare``."""
    batch = [torch.randn(1024, 16), torch.randn(1024, 1)]
    made = {
        "bare": lambda: [],
        "nothing due": lambda: [ObserverCallback(EffectiveRank(), when=Every(optim_steps=10**9), dirpath=folder)],
        "probe": lambda: [ProbeCallback(batch=batch, dirpath=folder)],
        "health": lambda: [HealthCallback(batch=batch, dirpath=folder)],
        "attribution": lambda: [AttributionCallback(batch=batch, dirpath=folder)],
        "patching": lambda: [PatchingCallback(batch=batch, dirpath=folder)],
    }
    return made[kind]()


def main() -> None:
    """Print the table that ``bench/README.md`` keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kinds = ["bare", "nothing due", "probe", "health", "attribution", "patching"]
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.repeats):
        weights = {}
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                seconds, weights[kind] = fitted(callbacks_of(kind, f"{folder}/run"))
                took[kind].append(seconds)
        if not all(torch.equal(weights["bare"], value) for value in weights.values()):
            raise SystemExit("a fit with a callback ended in other weights: the comparison is void")
    steps = EPOCHS * -(-ROWS // 64)
    bare = statistics.median(took["bare"])
    print(f"machine: {platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}, ", end="")
    print(f"Lightning {pl.__version__}; {steps} steps, median of {options.repeats}\n")
    print("| callback | s | / bare | µs a step more |\n|---|---|---|---|")
    for kind in kinds:
        seconds = statistics.median(took[kind])
        print(f"| {kind} | {seconds:.1f} | {seconds / bare:.3f} | {(seconds - bare) / steps * 1e6:.0f} |")


if __name__ == "__main__":
    main()
