"""The row of step k is what the same methods give by hand on Lightning's own checkpoint of step k, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from small import Net, data, fitted
from tensordict import TensorDict

from tdhook_train import ArtifactBuffer, At, HookedModel
from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.callbacks import ObserverCallback
from tdhook_train.health import DeadUnits, DormantUnits, EffectiveRank
from tdhook_train.latent import ActivationCache, ActivationPatching, Cka, LogisticProbe, RidgeProbe
from tdhook_train.observer.measure import Tick
from tdhook_train.schedule import Times

METHODS: dict[str, Any] = {
    "probe": [RidgeProbe("net.*", target="target")],
    "classes": [LogisticProbe("net.4", target="positive")],
    "attribution": [IntegratedGradients(rows=4, points=4)],
    "saliency": [Saliency()],
    "patching": [ActivationPatching(["net.0", "net.4"], "output", 4)],
    "health": [DormantUnits(), DeadUnits(), EffectiveRank()],
    "similarity": [Cka("net.*", ("initial", "previous", "layers"))],
    "activations": [ActivationCache(rows=3)],
}


def batch() -> dict[str, torch.Tensor]:
    x, y = (part[:40] for part in data().tensors)
    return {"input": x, "target": y, "positive": (y[:, 0] > 0).long()}


def checkpoint(path: Path, step: int, part: str) -> Any:
    (found,) = path.glob(f"*step={step}.ckpt")
    return torch.load(found, weights_only=True)[part]


def by_hand(model: torch.nn.Module, td: TensorDict, step: int, initial: Any, before: Any) -> dict[str, dict[Any, Any]]:
    """Every row of one step: of a model that no fit knows, in evaluation mode."""
    found: dict[str, dict[Any, Any]] = {}
    for name, methods in METHODS.items():
        row = found[name] = {}
        for place, method in enumerate(methods):
            known = {"generator": Tick(Times(step)).generator(f"{name}/{place}"), "previous": before.get(name)}
            with method.prepare(model.eval(), in_keys=["input"]) as hooked:
                out = hooked(td, initial=HookedModel(initial, in_keys=["input"]), **known)
            given = {*td.keys(), "output"}
            row |= {key: value for key, value in out.items(True, True) if key not in given}
    return found


PRECISIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
}


def bits(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else bits(value.reshape(1))


def check(run: Path, checkpoints: Path, precision: str = "32-true", part: str = "state_dict") -> None:
    """Compare the rows of steps 0, 3, 6, 9 and 12."""
    dtype = PRECISIONS[precision]
    pl.seed_everything(0, verbose=False)
    models = {step: Net().to(dtype).eval() for step in (0, 3, 6, 9, 12)}
    for step in (3, 6, 9, 12):
        models[step].load_state_dict(checkpoint(checkpoints, step, part))
    own = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch().items()}
    td, before = TensorDict(own, [40]), dict[str, Any]()
    with ArtifactBuffer.open(run) as buffer:
        assert sorted(buffer) == sorted(METHODS)
        for step, model in models.items():
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
                expected = by_hand(model, td, step, models[0], before)
            for name, row in expected.items():
                assert buffer[name].steps.tolist() == list(models)
                stored = {key: value for key, value in buffer[name].at(step).items(True, True) if key[0] != "meta"}
                assert stored.keys() == row.keys()
                assert [(step, name, key) for key, value in row.items() if bits(stored[key]) != bits(value)] == []
                before[name] = TensorDict(row)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_are_those_of_the_checkpoints(precision, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    callback = ObserverCallback(METHODS, every_n_train_steps=3, batch=batch(), dirpath=tmp_path / "run")
    fitted(tmp_path, [checkpoints, callback], precision=precision)
    check(tmp_path / "run", tmp_path / "ckpt", precision)


@pytest.mark.parametrize("first", ["average", "callbacks"])
@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_rows_of_averaged_weights_are_those_of_the_checkpoints(kind, first, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    average = WeightAveraging() if kind == "mean" else EMAWeightAveraging(decay=0.5)
    live, mean = (
        ObserverCallback(METHODS, every_n_train_steps=3, batch=batch(), weights=weights, dirpath=tmp_path / weights)
        for weights in ("live", "average")
    )
    last = ObserverCallback(METHODS, when=At(0), batch=batch(), dirpath=tmp_path / "last", name="last")
    fitted(
        tmp_path, [checkpoints, *([average, live, last, mean] if first == "average" else [live, last, mean, average])]
    )
    check(tmp_path / "average", tmp_path / "ckpt")
    check(tmp_path / "live", tmp_path / "ckpt", part="current_model_state")
    with ArtifactBuffer.open(tmp_path / "live") as each, ArtifactBuffer.open(tmp_path / "last") as one:
        assert one["probe"].steps.tolist() == [0, 12]  # at the end of the training, when the average is in the model
        assert torch.equal(one["probe"].at(12)["meta", "weights"], each["probe"].at(12)["meta", "weights"])
