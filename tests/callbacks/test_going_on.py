"""Checkpoints, resuming, errors and what other callbacks see."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small import Net, data, fitted, left, loader, rows, same, trainer_for
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import ArtifactBuffer, At, Every, When
from tdhook_train.callbacks import HealthCallback, ObserverCallback, ProbeCallback
from tdhook_train.health import EffectiveRank


def batch() -> list[torch.Tensor]:
    return [part[:20] for part in data().tensors]


def watching(path: Any, **options: Any) -> ObserverCallback:
    options = {"every_n_train_steps": 2, "batch": batch()} | options
    return ObserverCallback({"rank": EffectiveRank("net.*")}, dirpath=path, **options)


class Stops(pl.Callback):
    def __init__(self, error: type[BaseException], at: int) -> None:
        self.error, self.at = error, at

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise self.error("cut short")


@pytest.mark.parametrize("saved", [4, 6])  # within an epoch of 3 steps, and between two
def test_a_fit_that_is_resumed_has_the_rows_of_one_that_was_never_interrupted(saved, tmp_path):
    class Plain(Net):
        """Without dropout: Lightning does not restore random states."""

        def training_step(self, batch: Any, index: int) -> Any:
            self.net[3].eval()
            return super().training_step(batch, index)

    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=saved, save_top_k=-1, filename="{step}")

    def fit(path: Any, callbacks: list[Any], **how: Any) -> Any:
        pl.seed_everything(0, verbose=False)
        model, trainer = Plain(), trainer_for(tmp_path, [watching(path), *callbacks], max_epochs=4)
        same_batch = TensorDataset(*(part.repeat(3, 1) for part in batch()))  # a DataLoader begins an epoch anew
        batches = DataLoader(same_batch, batch_size=20)
        trainer.fit(model, batches, **how)
        return left(model, trainer)

    whole = fit(tmp_path / "whole", [])
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "cut", [checkpoints, Stops(ZeroDivisionError, saved + 2)])
    with ArtifactBuffer.open(tmp_path / "cut") as buffer:
        assert buffer["rank"].steps[-1] > saved
    again = fit(tmp_path / "cut", [checkpoints], ckpt_path=tmp_path / "ckpt" / f"step={saved}.ckpt")
    assert same(whole["weights"], again["weights"])
    assert rows(tmp_path / "whole", "attempt") == rows(tmp_path / "cut", "attempt")


def test_what_was_loaded_is_saved_again_where_nothing_has_begun(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", filename="end")
    fitted(tmp_path, [checkpoints, watching(tmp_path / "run")])
    again, key = watching(tmp_path / "run"), watching(tmp_path).state_key
    state = torch.load(tmp_path / "ckpt" / "end.ckpt", weights_only=True)["callbacks"][key]
    again.load_state_dict(state)
    assert again.state_dict() == state != {}


def test_a_checkpoint_can_be_read_by_people_without_this_package(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", filename="end")
    fitted(tmp_path, [checkpoints, watching(tmp_path / "run"), HealthCallback(dirpath=tmp_path / "health")])
    stored = torch.load(tmp_path / "ckpt" / "end.ckpt", weights_only=True)
    ours = [key for key in stored["callbacks"] if "Callback" in key]
    assert len(ours) == 2

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(part) for key, part in value.items())
        return isinstance(value, int | float | str | bool | None)

    assert all(plain(stored["callbacks"][key]) for key in ours)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_fit_that_is_cut_short_leaves_whole_rows_and_nothing_else(error, tmp_path):
    pl.seed_everything(0, verbose=False)
    model, callback = Net(), watching(tmp_path / "run")
    trainer = trainer_for(tmp_path, [callback, Stops(error, 5)])
    with pytest.raises((error, SystemExit)):
        trainer.fit(model, loader())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert buffer["rank"].steps.tolist() == [0, 2, 4]
    with ArtifactBuffer(tmp_path / "run", resume=True) as buffer:  # nobody holds it
        assert len(buffer["rank"]) == 3


@pytest.mark.parametrize("before", [True, False])
def test_another_callback_that_raises_first_costs_no_row(before, tmp_path):
    callback, stops = watching(tmp_path / "run"), Stops(ZeroDivisionError, 4)
    with pytest.raises(ZeroDivisionError):
        fitted(tmp_path, [stops, callback] if before else [callback, stops])
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert buffer["rank"].steps.tolist() == ([0, 2] if before else [0, 2, 4])


def test_scalars_reach_the_loggers_the_checkpoints_and_early_stopping(tmp_path):
    logger = CSVLogger(tmp_path, name="csv")
    monitor = "health/effective_rank"
    callbacks = [
        HealthCallback(dirpath=tmp_path / "run", every_n_train_steps=2, batch=batch()),
        ModelCheckpoint(tmp_path / "ckpt", monitor=monitor, mode="max", every_n_train_steps=2),
        EarlyStopping(monitor, mode="max", patience=100, check_on_train_epoch_end=True),
    ]
    fitted(tmp_path, callbacks, logger=logger)
    logger.save()
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        ranks = buffer["health"].series("effective_rank").mean(1).tolist()
    lines = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index(monitor)
    assert [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]] == pytest.approx(ranks)
    assert float(callbacks[1].best_model_score) == pytest.approx(max(ranks[1:]))


@pytest.mark.parametrize(
    ("cadence", "steps"),
    [
        ({"every_n_train_steps": 5}, [0, 5, 10, 12]),
        ({"every_n_epochs": 1}, [0, 6, 12]),
        ({"when": At(3) | Every(batches=8)}, [3, 8, 12]),
        ({}, list(range(13))),  # 2 % of 12 steps
        ({"when": When(lambda clock: clock.step in (0, 4, 6))}, [0, 4, 6, 12]),  # once at 6, which ends an epoch
    ],
)
def test_cadences(cadence, steps, tmp_path):
    fitted(tmp_path, [watching(tmp_path / "run", **({"every_n_train_steps": None} | cadence))])
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert buffer["rank"].steps.tolist() == steps


def test_a_fast_run_writes_nothing_and_a_sanity_check_measures_nothing(tmp_path):
    fitted(tmp_path, [watching(tmp_path / "run")], fast_dev_run=True)
    assert not (tmp_path / "run").exists()
    pl.seed_everything(0, verbose=False)
    trainer_for(tmp_path, [watching(tmp_path / "run")], max_steps=3).fit(Net(), loader(), loader(shuffle=False))
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert buffer["rank"].steps.tolist() == [0, 2, 3]


def test_the_run_lies_in_the_loggers_folder_by_default(tmp_path):
    callback = ProbeCallback("net.*", target="target", every_n_train_steps=6, batch=batch())
    fitted(tmp_path, [callback], logger=CSVLogger(tmp_path, name="csv"))
    with ArtifactBuffer.open(tmp_path / "csv" / "version_0" / "tdhook" / "probe") as buffer:
        assert buffer["probe"].steps.tolist() == [0, 6, 12]


def test_two_of_a_kind_are_told_apart(tmp_path):
    one, two = (watching(tmp_path / name, name=name) for name in ("one", "two"))
    assert one.state_key != two.state_key
    fitted(tmp_path, [one, two])
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


@pytest.mark.parametrize(
    "options",
    [{"every_n_epochs": 1}, {"when": At(0)}, {"dataloader": []}],
)
def test_settings_that_exclude_each_other_are_refused(options, tmp_path):
    with pytest.raises(MisconfigurationException):
        watching(tmp_path, **options)


def test_inputs_are_named(tmp_path):
    class Dict(Net):
        def training_step(self, batch: Any, index: int) -> Any:
            return super().training_step((batch["x"], batch["y"]), index)

    x, y = data().tensors
    batches = DataLoader([{"y": y[i], "x": x[i]} for i in range(60)], batch_size=10)
    callback = ProbeCallback("net.*", target="y", inputs="x", every_n_train_steps=3, dirpath=tmp_path / "run")
    pl.seed_everything(0, verbose=False)
    trainer_for(tmp_path, [callback], max_epochs=1).fit(Dict(), batches)
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert buffer["probe"].steps.tolist() == [0, 3, 6]
        assert buffer["probe"].coords["target"] == ["y"]
