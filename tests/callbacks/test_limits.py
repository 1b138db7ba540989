"""Fits that are limited, that have no length, that are begun again, that are cut short; and what is no fit."""

from __future__ import annotations

import os
import signal
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small import Net, data, left, loader, same, trainer_for
from tensordict import TensorDict
from torch.utils.data import DataLoader, IterableDataset

from tdhook_train import ArtifactBuffer, At, Every
from tdhook_train.callbacks import EditCallback, HealthCallback, ObserverCallback, ProbeCallback
from tdhook_train.errors import RunExistsError
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import Ablate


def batch() -> list[torch.Tensor]:
    return [part[:20] for part in data().tensors]


def watching(path: Path, **options: Any) -> ObserverCallback:
    options = {"every_n_train_steps": 2} | options
    return ObserverCallback({"rank": EffectiveRank("net.*")}, dirpath=path, **options)


def steps(path: Path) -> list[int]:
    with ArtifactBuffer.open(path) as buffer:
        return buffer["rank"].steps.tolist()


class Stream(IterableDataset[Any]):
    """Nobody knows how long it is."""

    def __iter__(self) -> Any:
        return iter(zip(*data().tensors, strict=True))


def stream() -> Any:
    return DataLoader(Stream(), batch_size=10)


FITS: dict[str, tuple[dict[str, Any], Any, list[int]]] = {
    "limit_train_batches": ({"limit_train_batches": 3}, loader, [0, 2, 4, 6]),
    "a share of the batches": ({"limit_train_batches": 0.5}, loader, [0, 2, 4, 6]),
    "limit_val_batches": ({"limit_val_batches": 0}, loader, [0, 2, 4, 6, 8, 10, 12]),
    "max_steps": ({"max_steps": 5, "max_epochs": -1}, loader, [0, 2, 4, 5]),
    "max_time": ({"max_time": timedelta(hours=1)}, loader, [0, 2, 4, 6, 8, 10, 12]),
    "val_check_interval": ({"val_check_interval": 2}, loader, [0, 2, 4, 6, 8, 10, 12]),
    "sanity": ({"num_sanity_val_steps": -1}, loader, [0, 2, 4, 6, 8, 10, 12]),
    "overfit": ({"overfit_batches": 0.5}, lambda: loader(shuffle=False), [0, 2, 4, 6]),
    "stream": ({"val_check_interval": 3}, stream, [0, 2, 4, 6, 8, 10, 12]),
    "endless": ({"max_steps": 7, "max_epochs": -1, "limit_val_batches": 0}, stream, [0, 2, 4, 6, 7]),
}


@pytest.mark.parametrize("kind", FITS)
def test_a_limited_fit_is_measured_as_far_as_it_goes(kind, tmp_path):
    how, batches, expected = FITS[kind]

    def fit(callbacks: list[Any]) -> Any:
        pl.seed_everything(0, verbose=False)
        model, trainer = Net(), trainer_for(tmp_path, callbacks, **how)
        trainer.fit(model, batches(), loader(shuffle=False))
        return left(model, trainer)

    bare, watched = fit([]), fit([watching(tmp_path / "run")])
    assert [part for part, value in bare.items() if not same(value, watched[part])] == []
    assert steps(tmp_path / "run") == expected


def test_a_fit_without_batches_leaves_nothing(tmp_path):
    trainer_for(tmp_path, [watching(tmp_path / "run")], limit_train_batches=0).fit(Net(), loader())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("batches", "expected"), [(loader, list(range(13))), (stream, [0, 12])])
def test_without_a_cadence_a_fit_of_unknown_length_is_measured_every_100_steps(batches, expected, tmp_path):
    callback = watching(tmp_path / "run", every_n_train_steps=None)
    trainer_for(tmp_path, [callback]).fit(Net(), batches())
    assert steps(tmp_path / "run") == expected


@pytest.mark.parametrize("on", [{}, {"batch": batch()}])
def test_the_end_alone_is_measured_where_that_is_asked(on, tmp_path):
    pl.seed_everything(0, verbose=False)
    model = Net()
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    callback = watching(tmp_path / "run", at="end", every_n_train_steps=None, **on)
    trainer_for(tmp_path, [callback], max_steps=7).fit(model, loader(shuffle=False))
    assert steps(tmp_path / "run") == [7]
    x = batch()[0] if on else data().tensors[0][:10]  # the seventh batch is the first of its epoch
    with EffectiveRank("net.*").prepare(model.eval()) as hooked, ArtifactBuffer.open(tmp_path / "run") as buffer:
        row = buffer["rank"].at(7)
        assert torch.equal(row["effective_rank"], hooked(TensorDict(input=x, batch_size=[len(x)]))["effective_rank"])
    stored = torch.load(tmp_path / "run" / "initial" / "weights.pt", weights_only=True)[""]
    assert torch.equal(stored["head"]["weight"], initial["head.weight"])


class Counts(Net):
    def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> None:
        pass


@pytest.mark.parametrize("on", [{}, {"batch": batch()}])
def test_each_round_of_several_validations_is_measured_once(on, tmp_path):
    callback = watching(tmp_path / "run", at="validation", every_n_train_steps=None, **on)
    trainer = trainer_for(tmp_path, [callback], val_check_interval=3)
    trainer.fit(Counts(), loader(), [loader(shuffle=False), DataLoader(data(), batch_size=15)])
    assert steps(tmp_path / "run") == [3, 6, 9, 12]


def test_a_fit_without_validation_says_that_nothing_was_measured(tmp_path):
    callback = watching(tmp_path / "run", at="validation", every_n_train_steps=None)
    with pytest.warns(UserWarning, match="'observer' measured nothing: at='validation', but the fit had none"):
        trainer_for(tmp_path, [callback]).fit(Net(), loader())


def test_optimizers_that_the_trainer_does_not_count_are_told(tmp_path):
    class Raw(Net):
        def training_step(self, batch: Any, _: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward((self(batch[0]) - batch[1]).square().mean())
            optimizer.step()

    callback = watching(tmp_path / "run", when=Every(batches=6), every_n_train_steps=None)
    with pytest.warns(UserWarning, match="counted no optimizer step"):
        trainer_for(tmp_path, [callback]).fit(Raw(manual=True), loader())
    assert steps(tmp_path / "run") == [0, 0]


CADENCES = [
    ({"every_n_train_steps": 5}, [0, 5, 10, 12, 15, 20, 24]),
    ({"every_n_train_steps": None, "every_n_epochs": 1}, [0, 6, 12, 18, 24]),
    ({"every_n_train_steps": None, "when": Every(batches=7) | At(3)}, [3, 7, 12, 14, 21, 24]),
]


@pytest.mark.parametrize(("cadence", "expected"), CADENCES)
def test_a_trainer_that_fits_twice_goes_on(cadence, expected, tmp_path):
    def fit(callbacks: list[Any]) -> Any:
        pl.seed_everything(0, verbose=False)
        model, trainer = Net(), trainer_for(tmp_path, callbacks)
        trainer.fit(model, loader())
        trainer.fit_loop.max_epochs = 4
        trainer.fit(model, loader())
        return left(model, trainer)

    bare, watched = fit([]), fit([watching(tmp_path / "run", **cadence)])
    assert [part for part, value in bare.items() if not same(value, watched[part])] == []
    assert steps(tmp_path / "run") == expected


def test_a_fresh_trainer_begins_anew(tmp_path):
    callback, model = watching(tmp_path / "run"), Net()
    trainer_for(tmp_path, [callback], max_epochs=1).fit(model, loader())
    with pytest.raises(RunExistsError, match="already holds a run"):
        trainer_for(tmp_path, [callback], max_epochs=1).fit(model, loader())
    assert steps(tmp_path / "run") == [0, 2, 4, 6]
    callback = watching(tmp_path / "run", overwrite=True)
    for epochs in (1, 2):
        trainer_for(tmp_path, [callback], max_epochs=epochs).fit(model, loader())
    assert steps(tmp_path / "run") == [0, 2, 4, 6, 8, 10, 12]


def test_nothing_but_a_fit_is_measured(tmp_path):
    class Full(Net):
        def test_step(self, batch: Any) -> None:
            self(batch[0])

        def predict_step(self, batch: Any) -> Any:
            return self(batch[0])

    def others(trainer: pl.Trainer) -> None:
        batches = loader(shuffle=False)
        trainer.validate(model, batches, verbose=False)
        trainer.test(model, batches, verbose=False)
        trainer.predict(model, batches)

    model = Full()
    validations = {"at": "validation", "every_n_train_steps": None, "name": "validations"}
    callbacks = [watching(tmp_path / "one"), watching(tmp_path / "two", **validations)]
    trainer = trainer_for(tmp_path, callbacks, max_epochs=1)
    others(trainer)
    assert not (tmp_path / "one").exists()
    assert not (tmp_path / "two").exists()
    trainer.fit(model, loader(), loader(shuffle=False))
    others(trainer)
    assert steps(tmp_path / "one") == [0, 2, 4, 6]
    assert steps(tmp_path / "two") == [6]


def opened() -> set[str]:
    """The files that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:  # the listing's own
            continue
    return {path for path in found if path.startswith("/") and not path.startswith(("/dev", "/proc"))}


@pytest.mark.parametrize("how", [{"precision": "bf16-mixed"}, {"manual": True}])
def test_a_fit_that_is_interrupted_within_a_step_leaves_nothing_open(how, tmp_path):
    class Interrupted(Net):
        def training_step(self, batch: Any, index: int) -> Any:
            if self.trainer.global_step == 5:
                raise KeyboardInterrupt
            return super().training_step(batch, index)

    model, handler = Interrupted(manual=how.get("manual", False)), signal.getsignal(signal.SIGINT)
    callbacks = [
        watching(tmp_path / "run"),
        ProbeCallback("net.*", every_n_train_steps=2, dirpath=tmp_path / "probe"),
        HealthCallback(batch=batch(), every_n_train_steps=2, dirpath=tmp_path / "health"),
        EditCallback(Ablate("net.2", units=1), when=At(3), dirpath=tmp_path / "edit"),
    ]
    trainer = trainer_for(tmp_path, callbacks, **{key: value for key, value in how.items() if key != "manual"})
    before, threads = opened(), set(threading.enumerate())
    try:
        with pytest.raises(SystemExit):
            trainer.fit(model, loader())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves Ctrl-C ignored
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {path for path in opened() - before if path.startswith(str(tmp_path))} == set()
    assert set(threading.enumerate()) <= threads
    assert not torch.is_autocast_enabled("cpu")
    assert steps(tmp_path / "run") == [0, 2, 4]
    for name in ("run", "probe", "health", "edit"):
        with ArtifactBuffer(tmp_path / name, resume=True) as buffer:  # nobody holds it
            assert all(len(buffer[row]) for row in buffer)
