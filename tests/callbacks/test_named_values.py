"""The named callbacks' values, against the same computed by hand on the checkpoints of a fit."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Net, data, fitted
from torch import Tensor

from tdhook_train import ArtifactBuffer
from tdhook_train.callbacks import ActivationCallback, HealthCallback, PatchingCallback, SimilarityCallback
from tdhook_train.errors import SettingsError

LAYERS = ["net.0", "net.3", "net.4"]
OPTIONS = {"every_n_train_steps": 6}


def batch() -> list[Tensor]:
    return [part[:40] for part in data().tensors]


def saved(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path, every_n_train_steps=6, save_top_k=-1, filename="{step}")


def model_of(path: Path) -> Net:
    model = Net()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return model.eval()


@torch.no_grad()
def activations(model: Net, layers: list[str] = LAYERS) -> dict[str, Tensor]:
    """By plain hooks of PyTorch."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(layer).register_forward_hook(lambda _, __, out, key=layer: found.update({key: out.clone()}))
        for layer in layers
    ]
    model(batch()[0])
    for handle in handles:
        handle.remove()
    return found


def cka(x: Tensor, y: Tensor) -> float:
    """Linear, debiased: Song et al. 2012, eq. 5, with the whole kernels."""

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        n = len(a)
        k, m = ((z @ z.T) * (1 - torch.eye(n, dtype=z.dtype)) for z in (a.double(), b.double()))
        one = torch.ones(n, dtype=torch.float64)
        middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
        return (torch.trace(k @ m) + middle) / (n * (n - 3))

    return float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt())


@pytest.mark.parametrize("kind", ["checkpoint", "text", "state dict"])
def test_layers_are_compared_with_those_of_a_checkpoint(kind, tmp_path):
    fitted(tmp_path, [saved(tmp_path / "one")])
    other = tmp_path / "one" / "step=12.ckpt"
    reference = {
        "checkpoint": other,
        "text": str(other),
        "state dict": torch.load(other, weights_only=True)["state_dict"],
    }[kind]
    callback = SimilarityCallback(LAYERS, reference=reference, batch=batch(), dirpath=tmp_path / "run", **OPTIONS)
    fitted(tmp_path, [saved(tmp_path / "two"), callback], gradient_clip_val=0.01, max_epochs=1)
    now, then = activations(model_of(tmp_path / "two" / "step=6.ckpt")), activations(model_of(other))
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        found = buffer["similarity"].at(6)["cka_reference"].tolist()
    assert found == pytest.approx([cka(now[layer], then[layer]) for layer in LAYERS], rel=1e-5)
    assert min(found) < 0.999


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (b"hello", "is no file of torch.save"),
        ([1, 2], "holds a list without tensors by name"),
        ({"state_dict": {}}, "holds a dict without tensors by name"),
        (
            {"state_dict": {"net.0.weights": torch.zeros(8, 4)}},
            "needs 'net.0.weight' of Net.*did you mean 'net.0.weights'",
        ),
        ({"state_dict": {}, "hyper_parameters": {"path": Path("x")}}, "is no file of torch.save"),
        (None, "needs to be a file"),
    ],
)
def test_a_file_that_is_no_reference_is_refused_and_nothing_is_left(stored, said, tmp_path):
    file = tmp_path / "file.ckpt"
    if isinstance(stored, bytes):
        file.write_bytes(stored)
    elif stored is not None:
        torch.save(stored, file)
    callback = SimilarityCallback(LAYERS, reference=file, batch=batch(), dirpath=tmp_path / "runs" / "one", **OPTIONS)
    with pytest.raises(SettingsError, match=said):
        fitted(tmp_path, [callback])
    assert not (tmp_path / "runs").exists()


def test_activations_are_those_of_plain_hooks(tmp_path):
    callback = ActivationCallback(LAYERS, keep=8, batch=batch(), dirpath=tmp_path / "run", **OPTIONS)
    fitted(tmp_path, [saved(tmp_path / "ckpt"), callback])
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        rows = buffer["activations"]
        assert rows.coords["batch"] == list(range(0, 40, 5))
        for step in (6, 12):
            expected = activations(model_of(tmp_path / "ckpt" / f"step={step}.ckpt"))
            for layer in LAYERS:
                assert torch.equal(rows.at(step)["activation", layer], expected[layer][::5])


def test_activations_of_the_batch_in_training_are_kept_whole(tmp_path):
    callback = ActivationCallback("net.*", keep=None, every_n_train_steps=1, dirpath=tmp_path / "run")
    fitted(tmp_path, [callback])
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert buffer["activations"].steps.tolist() == list(range(13))
        assert buffer["activations"].series(("activation", "net.4")).shape == (13, 10, 8)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"capacity": 3}, [10, 11, 12]),
        ({"capacity": 3, "keep": "newest"}, [10, 11, 12]),
        ({"capacity": 4, "keep": "log-spaced"}, None),
        ({"max_bytes": 20_000}, None),
    ],
)
def test_what_is_kept_has_limits(limits, steps, tmp_path):
    callback = ActivationCallback(LAYERS, batch=batch(), every_n_train_steps=1, limits=limits, dirpath=tmp_path / "run")
    fitted(tmp_path, [saved(tmp_path / "ckpt"), callback])
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        kept = buffer["activations"].steps.tolist()
        assert kept == steps if steps else 1 < len(kept) < 13
        assert kept[-1] == 12
        assert kept[0] == 0 or limits.get("keep") != "log-spaced"
        expected = activations(model_of(tmp_path / "ckpt" / "step=12.ckpt"))
        assert torch.equal(buffer["activations"].at(12)["activation", "net.4"], expected["net.4"])


def test_no_tensor_outlives_its_measurement(tmp_path):
    class Counts(pl.Callback):
        def __init__(self) -> None:
            self.found: dict[int, int] = {}

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step in (5, 11, 17, 23):  # at the same place of each epoch
                gc.collect()
                self.found[trainer.global_step] = sum(type(one) is Tensor for one in gc.get_objects())

    counts = Counts()
    callback = ActivationCallback(LAYERS, batch=batch(), every_n_train_steps=1, dirpath=tmp_path / "run")
    fitted(tmp_path, [callback, counts], max_epochs=4)
    assert len(counts.found) == 4
    assert len(set(counts.found.values())) == 1


def fitted_for_health(path: Path) -> tuple[dict[str, Tensor], Path]:
    callback = HealthCallback(LAYERS, taus=(0.0, 0.5), batch=batch(), dirpath=path / "run", **OPTIONS)
    fitted(path, [saved(path / "ckpt"), callback])
    return activations(model_of(path / "ckpt" / "step=12.ckpt")), path / "run"


def test_health_is_that_of_its_definitions(tmp_path):
    values, path = fitted_for_health(tmp_path)
    with ArtifactBuffer.open(path) as buffer:
        row = buffer["health"].at(12)
    for i, layer in enumerate(LAYERS):
        score = values[layer].abs().mean(0) / values[layer].abs().mean()
        assert row["dormancy"][i].tolist() == pytest.approx(score.tolist(), rel=1e-5)
        assert row["dormant"][i].tolist() == [float((score <= tau).float().mean()) for tau in (0.0, 0.5)]
        assert float(row["dead"][i]) == float((values[layer] == 0).all(0).float().mean())
        sigma = torch.linalg.svdvals(values[layer].double())
        share = sigma[sigma > 0] / sigma.sum()
        assert float(row["effective_rank"][i]) == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-4)
    assert 0 < float(row["dormant"][:, 1].mean()) < 1


@torch.no_grad()
def output(model: Net, x: Tensor, layer: str, change: Any) -> Tensor:
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, out: change(out))
    try:
        return model(x)[:, 0]
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "metric", ["output", ("output", 0), lambda out: out["output"][:, 0]], ids=["key", "feature", "function"]
)
def test_patching_is_that_of_a_hook_for_each_unit(metric, tmp_path):
    callback = PatchingCallback(["net.0", "net.4"], metric, 8, batch=batch(), dirpath=tmp_path / "run", **OPTIONS)
    fitted(tmp_path, [saved(tmp_path / "ckpt"), callback])
    model = model_of(tmp_path / "ckpt" / "step=12.ckpt")
    base = batch()[0][::5]
    source = base.roll(4, 0)  # the row half the batch away
    plain = model(base)[:, 0].detach()
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        row = buffer["patching"].at(12)
    for i, layer in enumerate(("net.0", "net.4")):
        other: list[Tensor] = []
        output(model, source, layer, lambda out, keep=other: keep.append(out.clone()))
        whole = output(model, base, layer, lambda out, new=other[0]: new)
        assert float(row["effect"][i]) == pytest.approx(float((whole - plain).abs().mean()), rel=1e-4)
        for unit in range(8):

            def one(out: Tensor, unit: int = unit, new: Tensor = other[0]) -> Tensor:
                out = out.clone()
                out[:, unit] = new[:, unit]
                return out

            effect = (output(model, base, layer, one) - plain).abs().mean()
            assert float(row["unit_effect"][i, unit]) == pytest.approx(float(effect), rel=1e-3, abs=1e-6)
