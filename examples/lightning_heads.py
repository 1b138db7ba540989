"""A small transformer learns to go on with what it has read once; which attention heads carry that, and since when."""

import sys

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import ArtifactBuffer
from tdhook_train.callbacks import PatchingCallback

LETTERS, HALF, WIDTH, HEADS = 12, 8, 32, 2


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH // HEADS), nn.Linear(WIDTH // HEADS, WIDTH)

    def forward(self, x):
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=True))


class Reader(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(LETTERS, WIDTH), nn.Embedding(2 * HALF, WIDTH)
        self.layers = nn.ModuleList(nn.ModuleList(Head() for _ in range(HEADS)) for _ in range(2))
        self.read = nn.Linear(WIDTH, LETTERS)

    def forward(self, text):
        x = self.token(text) + self.place.weight[: text.shape[1]]
        for heads in self.layers:
            x = x + sum(head(x) for head in heads)
        return self.read(x)

    def training_step(self, batch, _):
        logits = self(batch[0][:, :-1])[:, HALF:]  # the second half says the first again
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, HALF + 1 :].flatten())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


folder = sys.argv[1] if len(sys.argv) > 1 else "runs/heads"
pl.seed_everything(0, verbose=False)
text = torch.randint(LETTERS, (3200, HALF)).repeat(1, 2)
letter = {"first letter": ("output", 14, 0)}  # the logit of one letter, where the last one is to be said
fixed = {"batch": [text[:256]], "every_n_train_steps": 50, "dirpath": folder}
patching = PatchingCallback("layers.*.*.out", letter, 128, **fixed)
trainer = pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[patching])
trainer.fit(Reader(), DataLoader(TensorDataset(text), batch_size=32, shuffle=True))
with ArtifactBuffer.open(folder) as buffer:
    closed = buffer["patching"].to_xarray().normalised.squeeze("target")  # share of the difference between two texts
    for step in closed.step.values:
        heads = {str(name)[7:10]: round(float(closed.sel(step=step, layer=name)), 2) for name in closed.layer.values}
        print(f"step {step}: patched head closes {heads}")
