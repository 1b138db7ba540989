"""What a YAML file sets up: ``python lightning_cli.py fit --config lightning_cli.yaml``."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regressor(pl.LightningModule):
    def __init__(self, width: int = 32):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


class Products(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(2000, 6)
        return DataLoader(TensorDataset(x, x[:, :1] * x[:, 1:2]), batch_size=100, shuffle=True)


if __name__ == "__main__":
    LightningCLI(Regressor, Products, save_config_callback=None)
