"""A fit that saved checkpoints, measured while it ran and once more afterwards: the same rows, bit for bit."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import sweep
from tdhook_train.callbacks import ObserverCallback
from tdhook_train.checkpoints import differences
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import Cka, RidgeProbe

torch.set_num_threads(1)


class Product(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sweep")
pl.seed_everything(0, verbose=False)
x = torch.randn(2048, 4)
data = TensorDataset(x, x[:, :1] * x[:, 1:2])
methods = {
    "probe": RidgeProbe("net.*", target="target"),  # does a layer know the product?
    "similarity": Cka("net.*", to=("initial", "previous")),
    "rank": EffectiveRank(),
}
live = ObserverCallback(
    methods, every_n_train_steps=64, batch=data[:512], dirpath=folder / "live", log_metrics=False, prog_bar=False
)
saved = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=64, save_top_k=-1, filename="{step}")
trainer = pl.Trainer(max_epochs=10, accelerator="cpu", logger=False, callbacks=[saved, live])
module = Product()
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
torch.save(module.state_dict(), folder / "checkpoints" / "step=0.pt")  # the callback measures step 0 as well
trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True))

after = sweep(folder / "checkpoints", Product, methods, data=folder / "live", into=folder / "after")
print(after["probe"].to_xarray().r2.squeeze("target").to_pandas().round(2))
print("differences:", differences(folder / "live", after))
