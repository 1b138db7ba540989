"""When a callback measures, and which weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from small import Net, data, fitted, loader, same, trainer_for
from tensordict import TensorDict

from tdhook_train import ArtifactBuffer, Method
from tdhook_train.attribution import Saliency
from tdhook_train.callbacks import HealthCallback, ObserverCallback
from tdhook_train.health import EffectiveRank


@dataclass(frozen=True)
class Weight(Method):
    """Tells which weights were measured, and whether gradients can be asked for."""

    writes: ClassVar = {"weight": "", "rows": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        weight = model.module.head.weight.detach().flatten()[0].clone()
        return TensorDict({"weight": weight, "rows": torch.tensor(len(seen.batch))})


def batch() -> list[Any]:
    return [part[:20] for part in data().tensors]


class Notes(pl.Callback):
    """The weight at each moment, and the averaged one."""

    def __init__(self, average: Any = None) -> None:
        self.steps: dict[int, float] = {}
        self.validations: dict[int, float] = {}
        self.average = average

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        module = pl_module if self.average is None else self.average._average_model.module
        self.steps[trainer.global_step] = module.head.weight.detach().flatten()[0].item()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validations[trainer.global_step] = pl_module.head.weight.detach().flatten()[0].item()


def test_validations_are_measured_where_it_is_asked(tmp_path):
    notes = Notes()
    callback = ObserverCallback([Weight(), Saliency()], at="validation", dirpath=tmp_path / "run")
    pl.seed_everything(0, verbose=False)
    trainer = trainer_for(tmp_path, [callback, notes], val_check_interval=3, num_sanity_val_steps=1)
    trainer.fit(Net(), loader(), loader(shuffle=False))
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        rows = buffer["observer"]
        assert dict(zip(rows.steps.tolist(), rows.series("weight").tolist(), strict=True)) == notes.validations
        assert list(notes.validations) == [3, 6, 9, 12]
        assert rows.series("rows").tolist() == [10] * 4
        assert rows.series(("attr", "input")).abs().sum() > 0


def test_a_fit_with_validation_ends_in_the_same_bits(tmp_path):
    def fit(callbacks: list[Any]) -> Any:
        pl.seed_everything(0, verbose=False)
        model, trainer = Net(), trainer_for(tmp_path, callbacks, val_check_interval=3)
        trainer.fit(model, loader(), loader(shuffle=False))
        return model.state_dict(), torch.get_rng_state(), dict(trainer.callback_metrics)

    callbacks = [
        HealthCallback(at="validation", dirpath=tmp_path / "one", log_metrics=False),
        HealthCallback(every_n_train_steps=2, dirpath=tmp_path / "two", name="two", log_metrics=False),
    ]
    assert all(same(dict(a) if isinstance(a, dict) else a, b) for a, b in zip(fit([]), fit(callbacks), strict=True))


def test_averaged_weights_are_a_setting(tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    notes = Notes(average)
    live, mean = (
        ObserverCallback(
            Weight(), every_n_train_steps=3, batch=batch(), weights=weights, dirpath=tmp_path / weights, name="w"
        )
        for weights in ("live", "average")
    )
    fitted(tmp_path, [average, live, mean, notes])
    with ArtifactBuffer.open(tmp_path / "live") as one, ArtifactBuffer.open(tmp_path / "average") as other:
        found = dict(zip(other["w"].steps.tolist(), other["w"].series("weight").tolist(), strict=True))
        assert {step: found[step] for step in (3, 6, 9)} == {step: notes.steps[step] for step in (3, 6, 9)}
        assert one["w"].series("weight").tolist()[1:] != other["w"].series("weight").tolist()[1:]
    assert live.state_key != mean.state_key


def test_averaged_weights_need_somebody_to_average_them(tmp_path):
    callback = HealthCallback(every_n_train_steps=3, batch=batch(), weights="average", dirpath=tmp_path / "run")
    with pytest.raises(MisconfigurationException, match="such as WeightAveraging"):
        fitted(tmp_path, [callback])


@pytest.mark.parametrize(
    "options", [{"at": "validate"}, {"weights": "mean"}, {"at": "validation", "every_n_epochs": 1}]
)
def test_moments_that_mean_nothing_are_refused(options):
    with pytest.raises(MisconfigurationException):
        HealthCallback(**options)


EVENTS = ["on_fit_start", "on_train_start", "on_train_batch_start", *["on_train_batch_end"] * 6, "on_train_epoch_end"]
EVENTS += [*["on_train_batch_end"] * 6, "on_train_epoch_end", "on_train_end"]


def test_what_is_done_at_which_event(tmp_path):
    callback = HealthCallback(every_n_train_steps=1, batch=batch(), dirpath=tmp_path / "run")
    done: list[str] = []
    measured: list[tuple[str, int]] = []

    def spied(name: str) -> Any:
        real = getattr(callback, name)

        def call(*args: Any) -> Any:
            before = 0 if callback.observer is None else callback.observer.meter.ticks
            out = real(*args)
            ticks = 0 if callback.observer is None else callback.observer.meter.ticks
            if name != "on_train_batch_start" or ticks > before:
                done.append(name)
            measured.extend([(name, args[0].global_step)] * (ticks - before))
            return out

        return call

    for name in set(EVENTS):
        setattr(callback, name, spied(name))
    fitted(tmp_path, [callback])
    assert done == EVENTS
    assert measured == [("on_train_batch_start", 0), *[("on_train_batch_end", step) for step in range(1, 13)]]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_configured_late_or_compiled_is_measured(compiled, tmp_path):
    class Late(Net):
        def configure_model(self) -> None:
            if not hasattr(self, "extra"):
                self.extra = torch.nn.Linear(1, 1)

        def forward(self, x: Any) -> Any:
            return self.extra(super().forward(x))

    pl.seed_everything(0, verbose=False)
    model = torch.compile(Late(), backend="eager") if compiled else Late()
    callback = ObserverCallback(
        {"rank": EffectiveRank("extra")}, every_n_train_steps=3, batch=batch(), dirpath=tmp_path / "run"
    )
    trainer_for(tmp_path, [callback], max_epochs=1).fit(model, loader())
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert buffer["rank"].steps.tolist() == [0, 3, 6]
