"""A fit ends in the same bits with a callback as without, and rows are those of checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Net, data, fitted, same
from tensordict import TensorDict
from torch.utils.data import DataLoader

from tdhook_train import ArtifactBuffer
from tdhook_train.attribution import IntegratedGradients
from tdhook_train.callbacks import ObserverCallback
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import ActivationPatching, RidgeProbe

METHODS = {
    "probe": RidgeProbe(target="target", shifts=0),
    "ig": IntegratedGradients(rows=4, points=4),
    "patching": ActivationPatching(pairs=4),
    "health": EffectiveRank(),
}


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
    bare = fitted(tmp_path / "bare", [], **SETTINGS[name])
    options: dict[str, Any] = {"dataloader": DataLoader(data(40), batch_size=20, shuffle=True)} if on != "batch" else {}
    callback = ObserverCallback(METHODS, every_n_train_steps=2, dirpath=tmp_path / "run", **options)
    watched = fitted(tmp_path / "watched", [callback], **SETTINGS[name])
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
