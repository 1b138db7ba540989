"""The live model changed on request, as by a plain hook, and put back."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small import Net, fitted, left, loader, same, trainer_for

from tdhook_train import ArtifactBuffer, At
from tdhook_train.callbacks import ActivationCallback, EditCallback
from tdhook_train.health import ReDo
from tdhook_train.latent import Ablate


class ByHand(pl.Callback):
    """Zeroes a unit by a plain hook from one step to another."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.handle = first, last, None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.first:
            self.handle = pl_module.net[2].register_forward_hook(lambda _m, _a, out: out * torch.arange(8).ne(1))
        elif trainer.global_step == self.last and self.handle is not None:
            self.handle.remove()


def test_a_span_trains_as_the_same_change_by_hand(tmp_path):
    edit = EditCallback(Ablate("net.2", units=1), when=At(3), steps=4, dirpath=tmp_path / "run")
    found, expected = fitted(tmp_path, [edit]), fitted(tmp_path, [ByHand(3, 7)])
    assert same(found, expected)
    assert not same(found["weights"], fitted(tmp_path, [])["weights"])
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert buffer["edit"].steps.tolist() == [3, 7]
        assert buffer["edit"].series("active").tolist() == [1, 0]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_edit_is_undone_when_a_fit_is_cut_short(error, tmp_path):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                raise error

    pl.seed_everything(0, verbose=False)
    model = Net()
    edit = EditCallback(Ablate("net.2", units=1), when=At(3), dirpath=tmp_path / "run")
    with pytest.raises((error, SystemExit)):
        trainer_for(tmp_path, [edit, Stops()]).fit(model, loader())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dormant_units_are_recycled_with_their_moments(tmp_path):
    class Sleeps(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 8))
            with torch.no_grad():
                self.net[0].bias[2], self.net[0].weight[2] = -9.0, 0.0

        def training_step(self, batch: Any, _: int) -> Any:
            return (self(batch[0]) - batch[1]).square().mean()

    pl.seed_everything(0, verbose=False)
    model = Sleeps()
    edit = EditCallback(ReDo("net.0", tau=0.0), when=At(4), dirpath=tmp_path / "run")
    trainer = trainer_for(tmp_path, [edit], max_steps=4)
    trainer.fit(model, loader())
    assert model.net[0].weight[2].abs().sum() > 0
    assert (model.net[2].weight[:, 2] == 0).all()
    moments = trainer.optimizers[0].state[model.net[2].weight]["exp_avg"]
    assert (moments[:, 2] == 0).all()
    assert (moments[:, :2] != 0).any()
    assert left(model, trainer)["hooks"] == [0] * len(left(model, trainer)["hooks"])


def test_activations_are_those_of_the_layers(tmp_path):
    x = torch.randn(10, 4)
    callback = ActivationCallback("net.*", keep=5, batch=[x], every_n_train_steps=12, dirpath=tmp_path / "run")
    pl.seed_everything(0, verbose=False)
    model = Net()
    trainer_for(tmp_path, [callback]).fit(model, loader())
    value = x[::2]
    with ArtifactBuffer.open(tmp_path / "run") as buffer, torch.no_grad():
        row = buffer["activations"].at(12)
        for i, layer in enumerate(model.eval().net):
            value = layer(value)
            if i not in (1, 2):  # the activation after it works in place
                assert torch.allclose(row["activation", f"net.{i}"], value, atol=1e-6)
