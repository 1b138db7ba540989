"""Layers are named to an observer as to a model: by class, by predicate, and under any name of a shared module."""

import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import ArtifactBuffer, At, Observer
from tdhook_train.health import DormantUnits, EffectiveRank
from tdhook_train.latent import RidgeProbe


def tanh(module):
    return isinstance(module, nn.Tanh)


def test_rows_carry_the_layers_that_were_chosen(tmp_path):
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(4, 2))
    td = TensorDict({"input": torch.randn(64, 3), "y": torch.randn(64)}, [64])
    methods = {
        "class": RidgeProbe(layers=nn.Linear, target="y"),
        "predicate": DormantUnits(layers=tanh),
        "names": EffectiveRank(layers=["4", "2"]),
    }
    with Observer(methods, when=At(0), into=tmp_path / "run") as observer:
        observer.step(model, td, step=0)
    buffer = ArtifactBuffer.open(tmp_path / "run")
    assert buffer["class"].coords["layer"] == ["0", "2", "5"]
    assert buffer["predicate"].coords["layer"] == ["1", "3"]
    assert buffer["names"].coords["layer"] == ["4", "2"]
    assert buffer["names"].coords["layer_type"] == ["Linear", "Linear"]
    second, first = buffer["names"].series("effective_rank")[0]
    assert second == first  # one layer, read once
