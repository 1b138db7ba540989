"""A fit ends in the same bits with a callback as without, and rows are those of checkpoints."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import ArtifactBuffer
from tdhook_train.attribution import IntegratedGradients
from tdhook_train.callbacks import ObserverCallback
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import ActivationPatching, RidgeProbe

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(num_workers|does not have many workers|log_every_n_steps|isinstance).*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Net(pl.LightningModule):
    """Dropout, BatchNorm, one of them frozen."""

    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.net = nn.Sequential(
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(inplace=True),
            nn.Dropout(0.2),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
        )
        self.net[5].eval()
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, _: int) -> Tensor | None:
        self.net[5].eval()
        loss = (self(batch[0]) - batch[1]).square().mean()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def data(rows: int = 60) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator)
    return TensorDataset(x, x[:, :1] * 2 + 0.1 * torch.randn(rows, 1, generator=generator))


METHODS = {
    "probe": RidgeProbe(target="target", shifts=0),
    "ig": IntegratedGradients(rows=4, points=4),
    "patching": ActivationPatching(pairs=4),
    "health": EffectiveRank(),
}


def fitted(tmp_path: Any, callbacks: list[Any], *, manual: bool = False, **options: Any) -> tuple[Net, Any]:
    pl.seed_everything(0, verbose=False)
    model = Net(manual=manual)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=callbacks,
        **options,
    )
    loader = DataLoader(data(), batch_size=10, shuffle=True)
    trainer.fit(model, loader)
    state = {
        "weights": {key: value.clone() for key, value in model.state_dict().items()},
        "rng": torch.get_rng_state(),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }
    return model, state


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


SETTINGS = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 4},
    "clipping": {"gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
    "manual": {"manual": True},
    "overfit": {"overfit_batches": 2},
}


@pytest.mark.parametrize("on", ["batch", "dataloader"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_fit_ends_in_the_same_bits(name, on, tmp_path):
    _, bare = fitted(tmp_path / "bare", [], **SETTINGS[name])
    options: dict[str, Any] = {"dataloader": DataLoader(data(40), batch_size=20, shuffle=True)} if on != "batch" else {}
    callback = ObserverCallback(METHODS, every_n_train_steps=2, dirpath=tmp_path / "run", **options)
    _, watched = fitted(tmp_path / "watched", [callback], **SETTINGS[name])
    for part, value in bare.items():
        assert same(value, watched[part]), part
    steps = {"accumulation": [0, 2, 4], "overfit": [0, 2, 4]}.get(name, [0, 2, 4, 6, 8, 10, 12])
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        for row in METHODS:
            assert buffer[row].steps.tolist() == steps


def test_a_row_of_a_step_has_the_weights_of_a_checkpoint_of_that_step(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    batch = [part[:20] for part in data().tensors]
    callback = ObserverCallback(
        {"rank": EffectiveRank("net.*")}, every_n_train_steps=3, batch=batch, dirpath=tmp_path / "run"
    )
    fitted(tmp_path, [checkpoints, callback])
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        for step in (3, 6, 9, 12):
            (path,) = (tmp_path / "ckpt").glob(f"step={step}.ckpt")
            model = Net()
            model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
            td = TensorDict(input=batch[0], batch_size=[20])
            with EffectiveRank("net.*").prepare(model.eval()) as hooked:
                expected = hooked(td)["effective_rank"]
            assert torch.equal(buffer["rank"].at(step)["effective_rank"], expected)
