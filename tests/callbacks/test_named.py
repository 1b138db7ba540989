"""The named callbacks: what each measures, and on what it decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Net, data, fitted
from tensordict import TensorDict

from tdhook_train import ArtifactBuffer
from tdhook_train.callbacks import PatchingCallback, ProbeCallback, SimilarityCallback
from tdhook_train.errors import SettingsError
from tdhook_train.latent import ActivationPatching, LogisticProbe, RidgeProbe


def batch() -> TensorDict:
    x, y = (part[:40] for part in data().tensors)
    return TensorDict(input=x, target=y, positive=(y[:, 0] > 0).long(), batch_size=[40])


def kept(buffer: ArtifactBuffer, name: str) -> set[Any]:
    return {key if isinstance(key, tuple) else (key,) for key in buffer[name][0].keys(True, True)}


@pytest.mark.parametrize(
    ("target", "rows"),
    [
        ("target", {"probe": RidgeProbe}),
        ("positive", {"probe": LogisticProbe}),
        (["target", "positive"], {"probe": RidgeProbe, "probe.classes": LogisticProbe}),
    ],
)
def test_a_probe_goes_by_its_target(target, rows, tmp_path):
    callback = ProbeCallback("net.*", target, batch=batch(), every_n_train_steps=12, dirpath=tmp_path / "run")
    fitted(tmp_path, [callback])
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert {name: ("r2",) in kept(buffer, name) for name in buffer} == {
            name: kind is RidgeProbe for name, kind in rows.items()
        }


@pytest.mark.parametrize("probe", ["ridge", "logistic"])
def test_a_probe_may_be_chosen(probe, tmp_path):
    callback = ProbeCallback(
        "net.*", "positive", probe=probe, batch=batch(), every_n_train_steps=12, dirpath=tmp_path / "run"
    )
    fitted(tmp_path, [callback])
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert (("r2",) in kept(buffer, "probe")) == (probe == "ridge")


def test_a_probe_of_no_kind_is_refused():
    with pytest.raises(SettingsError, match="did you mean 'logistic'"):
        ProbeCallback(probe="logistics")


def test_a_probe_of_ones_own_has_its_own_settings(tmp_path):
    probe = RidgeProbe("net.4", target="positive", shifts=0)
    with pytest.raises(SettingsError, match="has layers and a target of its own"):
        ProbeCallback("net.*", probe=probe)
    fitted(tmp_path, [ProbeCallback(probe=probe, batch=batch(), every_n_train_steps=12, dirpath=tmp_path / "run")])
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert (buffer["probe"].coords["layer"], buffer["probe"].coords["target"]) == (["net.4"], ["positive"])


def test_patching_is_that_of_the_checkpoint(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    callback = PatchingCallback(
        ["net.0", "net.4"], "output", 8, batch=batch(), every_n_train_steps=6, dirpath=tmp_path / "run"
    )
    fitted(tmp_path, [checkpoints, callback])
    model = Net()
    model.load_state_dict(torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"])
    with ActivationPatching(["net.0", "net.4"], "output", 8).prepare(model.eval()) as hooked:
        expected = hooked(batch())
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        for key in ("effect", "unit_effect", "gap"):
            assert torch.equal(buffer["patching"].at(6)[key].nan_to_num(), expected[key].nan_to_num())


def test_layers_drift_from_where_they_were(tmp_path):
    callback = SimilarityCallback("net.*", batch=batch(), every_n_train_steps=4, dirpath=tmp_path / "run")
    fitted(tmp_path, [callback], max_epochs=6)
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        found: Any = buffer["similarity"].to_xarray()
        initial = found.cka_initial.mean("layer").values
        assert initial[0] == pytest.approx(1)
        assert initial[-1] < initial[1] < 1
        assert found.cka_previous.mean("layer").values[1:].min() > initial[-1]
