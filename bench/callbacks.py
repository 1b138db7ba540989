"""What the callbacks cost a fit: the three examples, bare and with their callbacks at the default cadence.

Fits of one seed take turns in random order in one process; all must end in the same weights.

    python bench/callbacks.py [--repeats 3] [--only images]
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import logging
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from _results import Row, asking, keep
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import ArtifactBuffer, Budget
from tdhook_train.attribution import IntegratedGradients
from tdhook_train.callbacks import (
    AttributionCallback,
    HealthCallback,
    ObserverCallback,
    PatchingCallback,
    ProbeCallback,
)
from tdhook_train.health import EffectiveRank
from tdhook_train.schedule import Every

FASHION = Path("/usr/share/datasets/fashion-mnist")
CALLS = 20_000


class Fit(pl.LightningModule):
    """A network with its loss and Adam."""

    def __init__(self, net: nn.Module, loss: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.net, self._loss = net, loss

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """Its loss."""
        return self._loss(self(batch[0]), batch[-1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 1e-3)


@dataclass(frozen=True)
class Example:
    """One of the examples: what is fitted, on what, for how long, and watched by which callbacks."""

    net: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Any]
    data: tuple[torch.Tensor, ...]
    batch_size: int
    epochs: int
    callbacks: Callable[[Callable[[str], dict[str, Any]]], list[ObserverCallback]]

    def fitted(self, callbacks: list[Any]) -> tuple[float, torch.Tensor]:
        """Fit, and return the seconds and the weights."""
        pl.seed_everything(0, verbose=False)
        model = Fit(self.net(), self.loss)
        quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
        trainer = pl.Trainer(max_epochs=self.epochs, accelerator="cpu", callbacks=callbacks, **quiet)
        loader = DataLoader(TensorDataset(*self.data), self.batch_size, shuffle=True)
        began = time.perf_counter()
        trainer.fit(model, loader)
        return time.perf_counter() - began, torch.cat([p.detach().flatten() for p in model.parameters()])


def images() -> Example:
    """The CNN of ``examples/lightning_images.py`` on all of Fashion-MNIST, or on the digits many times over."""
    if FASHION.is_dir():
        raw = [np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in sorted(FASHION.glob("train*"))]
        pixels, labels, side = raw[0][16:] / np.float32(255), raw[1][8:], 28
    else:
        pixels, labels = (np.tile(part, [30, *[1] * (part.ndim - 1)]) for part in load_digits(return_X_y=True))
        side = 8
    x = torch.tensor(pixels).float().view(-1, 1, side, side)

    def net() -> nn.Module:
        looks = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        return nn.Sequential(*looks, nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))

    def callbacks(options: Callable[[str], dict[str, Any]]) -> list[ObserverCallback]:
        explained = IntegratedGradients(lambda td: td["output"].gather(1, td["target"][:, None])[:, 0], rows=64)
        return [
            ProbeCallback(["net.6", "net.7", "net.8"], {"sleeves": sleeves}, **options("probe")),
            AttributionCallback(explained, **options("attribution")),
            HealthCallback("net.*", **options("health")),
        ]

    def sleeves(td: Any) -> torch.Tensor:
        return torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0, 0, 0])[td["target"]]

    return Example(net, nn.functional.cross_entropy, (x, torch.tensor(labels).long()), 64, 4, callbacks)


class Head(nn.Module):
    """One attention head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width // heads), nn.Linear(width // heads, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend to what came before."""
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=True))


class Reader(nn.Module):
    """Two layers of two heads."""

    def __init__(self, words: int = 20, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(words, width), nn.Embedding(16, width)
        self.layers = nn.ModuleList(nn.ModuleList(Head(width, heads) for _ in range(heads)) for _ in range(2))
        self.read = nn.Linear(width, words)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits of the next word."""
        x = self.token(text) + self.place.weight[: text.shape[1]]
        for heads in self.layers:
            x = x + sum(head(x) for head in heads)
        return self.read(x)


def heads() -> Example:
    """The transformer of ``examples/lightning_heads.py``: the second half of a text says the first again."""
    text = torch.randint(20, (20_000, 8), generator=torch.Generator().manual_seed(0)).repeat(1, 2)

    def loss(logits: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits[:, 7:-1].flatten(0, 1), text[:, 8:].flatten())

    def callbacks(options: Callable[[str], dict[str, Any]]) -> list[ObserverCallback]:
        return [PatchingCallback("net.layers.*.*.out", {"word": ("output", 14, 0)}, **options("patching"))]

    return Example(Reader, loss, (text,), 64, 30, callbacks)


def yaml() -> Example:
    """The regressor of ``examples/lightning_cli.yaml``, with its callbacks."""
    x = torch.randn(40_000, 6, generator=torch.Generator().manual_seed(0))

    def net() -> nn.Module:
        layers = [part for a, b in itertools.pairwise([6, 32, 32]) for part in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(32, 1))

    def callbacks(options: Callable[[str], dict[str, Any]]) -> list[ObserverCallback]:
        return [
            ProbeCallback("net.*", "target", **options("probe")),
            AttributionCallback(IntegratedGradients(points=16, rows=32), **options("attribution")),
        ]

    return Example(net, nn.functional.mse_loss, (x, x[:, :1] * x[:, 1:2]), 100, 40, callbacks)


EXAMPLES = {"images": images, "heads": heads, "yaml": yaml}
SIDES: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "observed": {},
    "budget": {"budget": Budget(overhead=0.05)},
    "background": {"background": True},
}


def run(name: str, repeats: int) -> list[Row]:
    """Print one row, and what each row of an artifact took; return what is kept."""
    example = EXAMPLES[name]()
    took: dict[str, list[float]] = {side: [] for side in SIDES}
    costs: dict[str, float] = {}
    weights: dict[str, torch.Tensor] = {}
    order = random.Random(0)
    for _ in range(repeats):
        for side in order.sample(list(SIDES), len(SIDES)):
            with tempfile.TemporaryDirectory() as folder:
                more = SIDES[side]
                callbacks = [] if more is None else example.callbacks(partial(_options, Path(folder), example, more))
                seconds, weights[side] = example.fitted(callbacks)
                took[side].append(seconds)
                if side == "observed":
                    costs = {callback.name: _cost(Path(folder) / callback.name) for callback in callbacks}
    if not all(torch.equal(weights["bare"], value) for value in weights.values()):
        raise SystemExit(f"{name}: a fit with callbacks ended in other weights: the comparison is void")
    bare = statistics.median(took["bare"])
    ratios = [statistics.median(took[side]) / bare for side in list(SIDES)[1:]]
    steps = example.epochs * -(-len(example.data[0]) // example.batch_size)
    told = ", ".join(f"{key} {value * 1e3:.0f}" for key, value in costs.items())
    print(
        f"| {name}, {steps:,} steps | {bare:.1f} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} | {told} |",
        flush=True,
    )
    hows = (("observed", 1.05), ("with Budget(0.05)", 1.05), ("in the background", None))
    return [
        Row(f"{name}, {steps:,} steps, {how}", "the bare fit", ratio, asked)
        for (how, asked), ratio in zip(hows, ratios, strict=True)
    ]


def _options(folder: Path, example: Example, more: dict[str, Any], name: str) -> dict[str, Any]:
    return {"batch": [part[:512] for part in example.data], "dirpath": folder / name, **more}


def _cost(folder: Path) -> float:
    """Return the mean seconds of a tick."""
    with ArtifactBuffer.open(folder) as buffer:
        return sum(float(buffer[row].series(("meta", "cost")).mean()) for row in buffer)


class Dispatch(pl.Callback):
    """Calls the other callbacks many times when nothing is due."""

    microseconds = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Time them, once."""
        if batch_idx != 3:
            return
        (watching,) = [callback for callback in trainer.callbacks if isinstance(callback, ObserverCallback)]
        repeats = []
        for _ in range(11):
            began = time.perf_counter()
            for _ in range(CALLS // 11):
                watching.on_train_batch_start(trainer, pl_module, batch, batch_idx)
                watching.on_train_batch_end(trainer, pl_module, None, batch, batch_idx)
            repeats.append((time.perf_counter() - began) / (CALLS // 11))
        self.microseconds = statistics.median(repeats) * 1e6


def dispatch() -> float:
    """Return the microseconds of a step at which nothing is due."""
    example, timer = yaml(), Dispatch()
    with tempfile.TemporaryDirectory() as folder:
        rarely = ObserverCallback(EffectiveRank(), when=Every(optim_steps=10**9), dirpath=folder + "/run")
        one = Example(example.net, example.loss, tuple(part[:1000] for part in example.data), 100, 1, example.callbacks)
        one.fitted([timer, rarely])
    return timer.microseconds


def main() -> None:
    """Print the table that ``bench/README.md`` keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=list(EXAMPLES))
    asking(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"machine: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; ", end="")
    print(f"torch {torch.__version__}, Lightning {pl.__version__}; median of {options.repeats}\n")
    print("| fit | bare, s | observed / bare | with Budget(0.05) | in the background | ms a tick |")
    print("|---|---|---|---|---|---|")
    rows = [row for name in ([options.only] if options.only else EXAMPLES) for row in run(name, options.repeats)]
    idle = dispatch()
    print(f"\na step at which nothing is due: {idle:.1f} µs more")
    rows.append(Row("a step at which nothing is due", "the bare callback", idle, 20, unit="µs more"))
    if options.keep:
        keep(__file__, rows, threads=torch.get_num_threads(), peers=["lightning"])


if __name__ == "__main__":
    main()
