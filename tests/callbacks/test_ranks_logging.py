"""What a module logs is reduced by all processes together, whatever a callback here reads of it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tdhook_train import ArtifactBuffer

SCRIPT = """
    import sys, warnings
    import lightning.pytorch as pl, torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    from tdhook_train.callbacks import HealthCallback

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            loss = (self(batch[0]) - batch[1]).square().mean()
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    if __name__ == "__main__":
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(x, x[:, :1] * 2)
        trainer = pl.Trainer(
            max_epochs=3, accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=True,
            callbacks=[HealthCallback("net.*", every_n_epochs=1, batch=[x], dirpath=sys.argv[1])],
        )
        trainer.fit(Net(), DataLoader(data, batch_size=10))
        print("losses", float(trainer.callback_metrics["loss"]))
"""


@pytest.mark.slow
def test_no_process_waits_for_another_at_the_end_of_an_epoch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert buffer["health"].steps.tolist() == [0, 2, 4, 6]
