"""A small transformer learns a toy text, who was given something by whom; which heads carry that, and since when."""

import itertools
import sys

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import ArtifactBuffer
from tdhook_train.callbacks import PatchingCallback

NAMES, THINGS, WIDTH, HEADS = ["ann", "ben", "eve", "ian", "joe", "kim"], ["ball", "book", "key", "map"], 32, 2
told = itertools.product(itertools.permutations(NAMES, 2), (0, 1), THINGS)
said = [f"when {a} and {b} met {(a, b)[g]} gave the {thing} to {(b, a)[g]}".split() for (a, b), g, thing in told]
WORDS = sorted({word for sentence in said for word in sentence})


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH // HEADS), nn.Linear(WIDTH // HEADS, WIDTH)

    def forward(self, x):
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=True))


class Reader(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(len(WORDS), WIDTH), nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(nn.ModuleList(Head() for _ in range(HEADS)) for _ in range(2))
        self.read = nn.Linear(WIDTH, len(WORDS))

    def forward(self, text):
        x = self.token(text) + self.place.weight[: text.shape[1]]
        for heads in self.layers:
            x = x + sum(head(x) for head in heads)
        return self.read(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def taker(td):  # the logit of who was given something, less that of who gave it, where the last word is to be said
    return td["output"][:, 9].gather(1, td["input"][:, [5, 10]]).diff(dim=1)[:, 0]


folder = sys.argv[1] if len(sys.argv) > 1 else "runs/heads"
pl.seed_everything(0, verbose=False)
text = torch.tensor([[WORDS.index(word) for word in sentence] for sentence in said])[torch.randperm(len(said))]
patching = PatchingCallback("layers.*.*.out", taker, batch=[text[:64]], every_n_train_steps=100, dirpath=folder)
trainer = pl.Trainer(max_steps=600, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[patching])
trainer.fit(Reader(), DataLoader(TensorDataset(text), batch_size=48, shuffle=True))
closed = ArtifactBuffer.open(folder)["patching"].to_xarray().normalised  # share of the gap between two sentences
print(closed.squeeze("target").to_pandas().round(2))
