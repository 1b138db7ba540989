"""What is wrong is said when a callback is made, or at the first batch, and leaves no folder and no hook."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from small import Net, data, loader, trainer_for

from tdhook_train.callbacks import (
    ActivationCallback,
    AttributionCallback,
    EditCallback,
    HealthCallback,
    ObserverCallback,
    PatchingCallback,
    ProbeCallback,
)
from tdhook_train.errors import KeyMissingError, PathError, SettingsError, TargetError
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import RidgeProbe


def batch() -> list[Any]:
    return [part[:20] for part in data().tensors]


MADE = {
    "an unknown keyword": (
        lambda: ProbeCallback("net.*", every_n_train_step=6),
        (SettingsError, r"ProbeCallback has no setting 'every_n_train_step'; did you mean 'every_n_train_steps'"),
    ),
    "one of the observer": (
        lambda: ObserverCallback(EffectiveRank(), budgt=None),
        (SettingsError, r"ObserverCallback has no setting 'budgt'; did you mean 'budget'"),
    ),
    "no method": (lambda: ObserverCallback({"a": 3}), (SettingsError, r"methods\['a'\] holds 3, which is no Method")),
    "a text": (lambda: AttributionCallback("ig"), (SettingsError, r"methods\['attribution'\] holds 'ig'")),
    "a class": (
        lambda: ObserverCallback({"a": RidgeProbe}),
        (SettingsError, r"which is no Method; make one: RidgeProbe\(...\)"),
    ),
    "no edit": (lambda: EditCallback(3, when=None), (SettingsError, r"needs an Edit or a Rewrite.*got 3")),
    "nothing": (lambda: ObserverCallback({}), (SettingsError, "an observer needs methods")),
    "a target": (
        lambda: ProbeCallback("net.*", "tarket", batch=batch()),
        (KeyMissingError, "target 'tarket' is not in the batch; did you mean 'target'"),
    ),
    "inputs": (
        lambda: HealthCallback(inputs="imput", batch=batch()),
        (KeyMissingError, "inputs='imput': the batch has no 'imput'; did you mean 'input'"),
    ),
    "a batch without tensors": (
        lambda: HealthCallback(batch=["a", 3]),
        (SettingsError, "a batch of type list holds no tensor with one row an item"),
    ),
    "a trigger": (lambda: HealthCallback(when=5), (SettingsError, r"when=5 is no trigger; e.g. when=Every")),
    "a time": (
        lambda: HealthCallback(train_time_interval=3),
        (SettingsError, r"train_time_interval=3 is no timedelta; e.g. timedelta\(minutes=5\)"),
    ),
    "a name": (lambda: HealthCallback(name="a/b"), (SettingsError, "'a/b' is no name: use letters, digits")),
    "on_error": (lambda: HealthCallback(on_error="rise"), (MisconfigurationException, "did you mean 'raise'")),
    "a limit": (lambda: ActivationCallback(limits={"maxbytes": 5}), (SettingsError, "did you mean 'max_bytes'")),
    "the value of a limit": (
        lambda: ActivationCallback(limits={"capacity": 0}),
        (SettingsError, "capacity=0: expected"),
    ),
    "pairs": (lambda: PatchingCallback(pairs=1), (SettingsError, "at least 2 pairs, got pairs=1")),
    "keep": (lambda: ActivationCallback(keep=0), (SettingsError, "rows of 1 or more, got 0")),
    "a period": (lambda: HealthCallback(every_n_train_steps=0), (SettingsError, "a positive period")),
}


@pytest.mark.parametrize("what", MADE)
def test_a_callback_that_cannot_work_is_not_made(what):
    make, (error, said) = MADE[what]
    with pytest.raises(error, match=said):
        make()


def fixed(**options: Any) -> dict[str, Any]:
    return {"batch": batch(), "every_n_train_steps": 6, **options}


FITTED = {
    "layers": (
        lambda path: ProbeCallback("nett.*", dirpath=path, **fixed()),
        (PathError, r"layers='nett.\*' matches no module of Net; did you mean 'net.5'"),
    ),
    "a target of the training": (
        lambda path: ProbeCallback("net.*", "tarket", dirpath=path, every_n_train_steps=6),
        (KeyMissingError, "target 'tarket' is not in the batch; did you mean 'target'"),
    ),
    "a target of a method": (
        lambda path: ObserverCallback(RidgeProbe("net.*", target="tarket"), dirpath=path, **fixed()),
        (KeyMissingError, "target 'tarket' is not in the batch; did you mean 'target'"),
    ),
    "one of two methods": (
        lambda path: ObserverCallback(
            {"a": EffectiveRank("net.*"), "b": RidgeProbe("net.*", target="tarket")}, dirpath=path, **fixed()
        ),
        (KeyMissingError, "target 'tarket' is not in the batch; did you mean 'target'"),
    ),
    "a metric": (
        lambda path: PatchingCallback("net.0", "outptu", 4, dirpath=path, **fixed()),
        (TargetError, "target 'outptu' is given out by no network; did you mean 'output'"),
    ),
    "inputs of the training": (
        lambda path: HealthCallback("net.*", inputs="imput", dirpath=path, every_n_train_steps=6),
        (KeyMissingError, "the batch has no 'imput'; did you mean 'input'"),
    ),
    "a dataloader that is empty": (
        lambda path: HealthCallback("net.*", dataloader=[], dirpath=path, every_n_train_steps=6),
        (SettingsError, "the dataloader of the probe set gave no batch"),
    ),
    "groups": (
        lambda path: ProbeCallback("net.*", groups="targets", dirpath=path, **fixed()),
        (KeyMissingError, "groups='targets' is no key of the probe set; did you mean 'target'"),
    ),
}


@pytest.mark.parametrize("what", FITTED)
def test_a_fit_ends_before_its_first_step_and_nothing_is_left(what, tmp_path):
    make, (error, said) = FITTED[what]
    pl.seed_everything(0, verbose=False)
    model, trainer = Net(), trainer_for(tmp_path, [make(tmp_path / "runs" / "one")])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=said):
        trainer.fit(model, loader())
    assert trainer.global_step == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not list(tmp_path.iterdir())


def test_what_others_have_in_the_folder_around_stays(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    make, (error, _) = FITTED["layers"]
    with pytest.raises(error):
        trainer_for(tmp_path, [make(tmp_path / "runs" / "one")]).fit(Net(), loader())
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "notes.txt"]


def test_an_error_that_is_only_noted_keeps_the_folder(tmp_path):
    methods = {"a": EffectiveRank("net.*"), "b": RidgeProbe("net.*", target="tarket")}
    callback = ObserverCallback(methods, dirpath=tmp_path / "run", on_error="skip", **fixed())
    trainer_for(tmp_path, [callback]).fit(Net(), loader())
    assert (tmp_path / "run" / "a").is_dir()
