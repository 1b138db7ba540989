"""Two processes give the rows of one, and an error of the first is everybody's."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tdhook_train import ArtifactBuffer

SCRIPT = """
    import sys, warnings
    from pathlib import Path
    import lightning.pytorch as pl, torch
    from dataclasses import dataclass
    from typing import ClassVar
    from tensordict import TensorDict
    from torch import nn
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
    from tdhook_train import Method
    from tdhook_train.callbacks import ObserverCallback
    from tdhook_train.health import EffectiveRank
    from tdhook_train.latent import RidgeProbe

    class Net(pl.LightningModule):
        def __init__(self, lr, data):
            super().__init__()
            self.data = data
            self.net, self.lr = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), lr

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return (self(batch[0]) - batch[1]).square().mean()

        def train_dataloader(self):  # Lightning's own sampler shuffles where there are several processes
            world, rank = self.trainer.world_size, self.trainer.global_rank
            sampler = DistributedSampler(self.data, world, rank, shuffle=False)
            return DataLoader(self.data, batch_size=20 // world, sampler=sampler)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

    @dataclass(frozen=True)
    class Fails(Method):
        writes: ClassVar = {"x": ""}

        def measure(self, seen, model):
            if seen.clock.step == 2:
                raise ZeroDivisionError("broken on purpose")
            return TensorDict({"x": torch.zeros(())})

    def main(folder, devices, lr, fixed, fails):
        torch.set_num_threads(1)
        pl.seed_everything(0, verbose=False)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(80, 4, generator=generator)
        data = TensorDataset(x, x[:, :1] * 2)
        methods = {"probe": RidgeProbe(target="target", shifts=0), "rank": EffectiveRank()}
        methods |= {"fails": Fails()} if fails else {}
        on = {"batch": [x[:40], x[:40, :1]]} if fixed else {}
        callback = ObserverCallback(methods, every_n_train_steps=2, dirpath=folder, **on)
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=devices, logger=False, enable_progress_bar=False,
            strategy="ddp_spawn" if devices > 1 else "auto", enable_checkpointing=False, callbacks=[callback],
            enable_model_summary=False, use_distributed_sampler=False,
        )
        trainer.fit(Net(lr, data))

    if __name__ == "__main__":
        warnings.simplefilter("ignore")
        main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "fixed", sys.argv[5] == "fails")
"""


def fitted(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = path.parent / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    return subprocess.run(
        [sys.executable, str(script), str(path), *options], capture_output=True, text=True, timeout=180
    )


def rows(path: Path) -> dict[Any, torch.Tensor]:
    with ArtifactBuffer.open(path) as buffer:
        return {
            (name, key): value
            for name in buffer
            for key, value in buffer[name][:].items(include_nested=True, leaves_only=True)
            if key[-1] not in ("time", "cost")
        }


@pytest.mark.slow
@pytest.mark.parametrize(("on", "lr"), [("batch", "0.0"), ("batch", "0.1"), ("fixed", "0.1")])
def test_two_processes_give_the_rows_of_one(on, lr, tmp_path):
    for devices in ("1", "2"):
        done = fitted(tmp_path / devices, devices, lr, on, "works")
        assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert one.keys() == two.keys()
    for key, value in one.items():
        if lr == "0.0":
            assert value.numpy().tobytes() == two[key].numpy().tobytes(), key
        # gradients of two halves are averaged, those of one batch summed: the weights differ in the last bits
        if value.is_floating_point() or key[1][-1] == "data":
            assert torch.allclose(value.double(), two[key].double(), rtol=1e-4, atol=1e-6, equal_nan=True), key


@pytest.mark.slow
def test_an_error_on_the_first_ends_both(tmp_path):
    done = fitted(tmp_path / "run", "2", "0.1", "batch", "fails")
    assert done.returncode != 0
    assert "broken on purpose" in done.stderr
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert buffer["fails"].steps.tolist() == [0]
