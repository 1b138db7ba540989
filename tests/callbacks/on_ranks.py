"""Fits for processes to run together: ``python on_ranks.py FOLDER DEVICES STRATEGY SCENARIO ...``.

Each process stores what it found of each scenario under ``FOLDER/SCENARIO-RANK.pt``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from tensordict import TensorDict
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import At, Budget, Every, Method, When
from tdhook_train.callbacks import EditCallback, ObserverCallback
from tdhook_train.health import EffectiveRank, ReDo
from tdhook_train.latent import Ablate, RidgeProbe
from tdhook_train.observer import LiveEdit

MONITOR = "rank/effective_rank"


class Net(pl.LightningModule):
    def __init__(self, lr: float = 0.1, *, odd: str = "") -> None:
        super().__init__()
        self.net, self.lr, self.odd = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), lr, odd

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.odd == "fails" and self.global_rank and index == 1:
            raise ZeroDivisionError("broken on rank 1")
        parts = 2 // self.trainer.world_size  # one process takes the mean over what two would have
        each = [self(batch["input"][i::parts]) - batch["target"][i::parts] for i in range(parts)]
        return sum(one.square().mean() / parts for one in each)

    def validation_step(self, batch: Any, _: int) -> None:
        self(batch["input"])

    def on_after_batch_transfer(self, batch: Any, _: int) -> Any:
        batch = {"input": batch[0], "target": batch[1]}
        if self.odd == "batch" and self.global_rank and self.trainer.global_step == 3:
            return Strange(batch)
        if self.odd == "shape" and self.global_rank:
            return {**batch, "wide": batch["input"][:, :2]}
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr)


class Sleeps(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
        with torch.no_grad():
            self.net[0].bias[2], self.net[0].weight[2] = -9.0, 0.0


class Strange:
    """A batch that trains and is no TensorDict."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts = parts

    def __getitem__(self, key: str) -> Any:
        return self.parts[key]


@dataclass(frozen=True)
class Rows(Method):
    """How many rows the batch has, and what they add up to."""

    writes: ClassVar = {"rows": "", "total": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        x = seen.batch["input"]
        return TensorDict({"rows": torch.tensor(float(len(x))), "total": x.double().sum()})


@dataclass(frozen=True)
class Fails(Method):
    error: type[BaseException] = ZeroDivisionError
    writes: ClassVar = {"x": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        if seen.clock.step == 2:
            raise self.error("broken on purpose")
        return TensorDict({"x": torch.zeros(())})


def data(rows: int = 80) -> TensorDataset:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :1] * 2)


class Parts(pl.LightningDataModule):
    """Deals rows out in turn, as Lightning does, which would shuffle them as well.

    Args:
        rows: of a repetition.
        batch: rows of all processes.
        repeated: how many times they come in an epoch.
        more: rows of a batch of rank 1 that rank 0 does not have.
    """

    def __init__(self, rows: int = 80, batch: int = 20, *, repeated: int = 1, more: int = 0) -> None:
        super().__init__()
        self.rows, self.batch, self.repeated, self.more = rows, batch, repeated, more

    def train_dataloader(self) -> DataLoader[Any]:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        own = TensorDataset(*(tensor[rank::world].repeat(self.repeated, 1) for tensor in data(self.rows).tensors))
        return DataLoader(own, batch_size=self.batch // world + rank * self.more, drop_last=True)


class Validated(Parts):
    val_dataloader = Parts.train_dataloader


def fixed() -> list[torch.Tensor]:
    return [tensor[:40] for tensor in data().tensors]


def watching(path: Any, **options: Any) -> ObserverCallback:
    methods = options.pop("methods", {"rank": EffectiveRank("net.*"), "probe": RidgeProbe(target="target", shifts=0)})
    cadence = {} if "when" in options or "train_time_interval" in options else {"every_n_train_steps": 2}
    return ObserverCallback(methods, **({"dirpath": path} | cadence | options))


class Fit:
    """Fits as asked for on the command line."""

    def __init__(self, devices: int = 1, strategy: str = "auto") -> None:
        self.devices, self.strategy = devices, strategy

    def __call__(
        self, path: Path, callbacks: list[Any], make: Callable[[], Net] = Net, **options: Any
    ) -> dict[str, Any]:
        pl.seed_everything(0, verbose=False)
        model = make()
        loaders = options.pop("loaders", None) or Parts()
        ckpt = options.pop("ckpt_path", None)
        known = {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": self.devices,
            "strategy": self._strategy(),
            "default_root_dir": path,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
        }
        trainer = pl.Trainer(**(known | options), callbacks=callbacks)
        trainer.fit(model, datamodule=loaders, ckpt_path=ckpt)
        return {
            "weights": {key: value.clone() for key, value in model.state_dict().items()},
            "rng": torch.get_rng_state(),
            "moments": {
                f"{i}.{name}": value
                for optimizer in trainer.optimizers  # of this process: none, if it started others
                for i, state in optimizer.state_dict()["state"].items()
                for name, value in state.items()
            },
            "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
            "step": trainer.global_step,
            "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        }

    def _strategy(self) -> Any:
        how = {"ddp": "popen", "ddp_spawn": "spawn"}.get(self.strategy)  # these shall not wait for ever
        return self.strategy if how is None else DDPStrategy(start_method=how, timeout=timedelta(seconds=45))


fit = Fit()


# ---------------------------------------------------------------------- what is looked at


def batch(path: Path) -> Any:
    return fit(path, [watching(path / "run")])


def thirds(path: Path) -> Any:
    """The last step is measured because it is the last."""
    return fit(path, [watching(path / "run", every_n_train_steps=3)])


def each(path: Path) -> Any:
    return fit(path, [watching(path / "run", every_n_train_steps=1)])


def given(path: Path) -> Any:
    return fit(path, [watching(path / "run", batch=fixed())])


def bare(path: Path) -> Any:
    return fit(path, [])


def monitored(path: Path) -> Any:
    """Checkpoints and an early stop by what was measured; the folder is the trainer's."""
    best = ModelCheckpoint(path / "ckpt", "{step}", monitor=MONITOR, mode="max", every_n_train_steps=2)
    stop = EarlyStopping(MONITOR, mode="max", patience=1, min_delta=100.0, check_on_train_epoch_end=True)
    found = fit(path, [watching(None, batch=fixed()), stop, best], max_epochs=5)
    return found | {"best": best.best_model_path, "score": float(best.best_model_score), "stopped": stop.stopped_epoch}


class Stops(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise ZeroDivisionError("cut short")


def resumed(path: Path) -> Any:
    """Saved in the middle of an epoch and cut short; then gone on with from the last."""
    same = {"max_epochs": 4, "loaders": Parts(40, 40, repeated=2)}  # a DataLoader begins an epoch anew
    whole = fit(path, [watching(path / "whole", batch=fixed())], **same)

    def saves() -> ModelCheckpoint:
        return ModelCheckpoint(path / "ckpt", "{step}", every_n_train_steps=3, save_last=True)

    with contextlib.suppress(ZeroDivisionError):
        callbacks = [watching(path / "run", batch=fixed()), saves(), Stops(5)]
        fit(path, callbacks, **same)
    again = watching(path / "run", batch=fixed())
    end = fit(path, [again, saves()], **same, ckpt_path="last")
    return {"whole": whole, "end": end, "state": again.state_dict()}


def _on_first(clock: Any) -> bool:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        raise AssertionError("asked on rank 1")
    return clock.step in (1, 4)


def timed(path: Path) -> Any:
    return fit(path, [watching(path / "run", train_time_interval=timedelta(microseconds=1))])


def asked(path: Path) -> Any:
    return fit(path, [watching(path / "run", when=When(_on_first))])


def followed(path: Path) -> Any:
    """Goes by what was measured, which rank 0 alone knows."""
    low = When("rank", "effective_rank", above=0.0, fires="while")
    return fit(path, [watching(path / "run", when=At(0) | Every(optim_steps=1) & low)])


def thrifty(path: Path) -> Any:
    return fit(path, [watching(path / "run", budget=Budget(overhead=1e-9))])


def _raises(how: str, path: Path) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fit(path, [watching(path / "run", methods={"fails": Fails()}, on_error=how)])
    return found | {"warned": [str(one.message) for one in caught if "broken on purpose" in str(one.message)]}


def behind(path: Path) -> Any:
    """Fails in the background, which rank 0 learns of while a checkpoint is made."""
    saves = ModelCheckpoint(path / "ckpt", "{step}", every_n_train_steps=1, save_top_k=-1)
    return fit(path, [watching(path / "run", methods={"fails": Fails()}, background=True), saves])


def _broken_trigger(clock: Any) -> bool:
    raise ZeroDivisionError("a trigger is broken")


def trigger(path: Path) -> Any:
    return fit(path, [watching(path / "run", when=When(_broken_trigger))])


def strange(path: Path) -> Any:
    return fit(path, [watching(path / "run")], partial(Net, odd="batch"))


def unlike(path: Path) -> Any:
    return fit(path, [watching(path / "run")], partial(Net, odd="shape"))


def nowhere(path: Path) -> Any:
    path.mkdir(parents=True, exist_ok=True)
    (path / "file").touch()
    return fit(path, [watching(path / "file" / "run")])


def uneven(path: Path) -> Any:
    """10 rows a batch on rank 0, and 11 on rank 1."""
    return fit(path, [watching(path / "run", methods={"rows": Rows()})], loaders=Parts(88, more=1))


def validated(path: Path) -> Any:
    callback = watching(path / "run", every_n_train_steps=None, at="validation")
    return fit(path, [callback], loaders=Validated(), max_epochs=2)


def averaged(path: Path) -> Any:
    return fit(path, [WeightAveraging(), watching(path / "run", weights="average", batch=fixed())])


class ByHand(Callback):
    """Zeroes a unit by a plain hook, from one step to another, on every rank."""

    handle: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            self.handle = pl_module.net[1].register_forward_hook(lambda _m, _a, out: out * torch.arange(8).ne(1))
        elif trainer.global_step == 3:
            self.handle.remove()


def span(path: Path) -> Any:
    edit = EditCallback(Ablate("net.1", units=1), when=At(1), steps=2, dirpath=path / "run")
    return {"edited": fit(path, [edit]), "by hand": fit(path, [ByHand()])}


def span_beside_rows(path: Path) -> Any:
    """An edit that is due when no row is."""
    edits = {"edit": LiveEdit(Ablate("net.1", units=1), At(1), 2)}
    return fit(path, [watching(path / "run", edits=edits, every_n_train_steps=4)])


def span_resumed(path: Path) -> Any:
    """Cut short while an edit is held, and gone on with."""
    same = {"loaders": Parts(40, 40, repeated=4)}

    def callbacks() -> list[Any]:
        edit = EditCallback(Ablate("net.1", units=1), when=At(1), steps=2, dirpath=path / "run")
        return [edit, ModelCheckpoint(path / "ckpt", "{step}", every_n_train_steps=2, save_last=True)]

    with contextlib.suppress(ZeroDivisionError):
        fit(path, [*callbacks(), Stops(3)], **same)
    found = fit(path, callbacks(), **same, ckpt_path="last", max_steps=4)
    return found | {"by hand": fit(path, [ByHand()], **same)}


def recycled(path: Path) -> Any:
    return fit(path, [EditCallback(ReDo("net.0", tau=0.0), when=At(2), dirpath=path / "run")], Sleeps)


def interrupted(path: Path) -> Any:
    return fit(path, [watching(path / "run", methods={"fails": Fails(KeyboardInterrupt)})])


def alone(path: Path) -> Any:
    return fit(path, [watching(path / "run")], partial(Net, odd="fails"))


class Sharded(Net):
    def configure_model(self) -> None:
        pass


def sharded(path: Path) -> Any:
    """Weights spread over processes: a fit starts on a CPU, and one with a callback is refused."""
    mesh = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    model = Sharded()
    try:
        fit(path, [watching(path / "run")], lambda: model, strategy=ModelParallelStrategy(**mesh))
    except MisconfigurationException as error:
        bare = fit(path, [], Sharded, strategy=ModelParallelStrategy(**mesh))
        return {"error": str(error), "step": model.trainer.global_step, "bare": bare["step"]}


_WATCHED = (batch, thirds, each, given, bare, monitored, resumed, timed, asked, followed, thrifty)
_OTHERS = (behind, trigger, strange, unlike, nowhere, uneven, validated, averaged, span, span_beside_rows, recycled)
_LAST = (span_resumed, sharded)
SCENARIOS: dict[str, Callable[[Path], Any]] = {
    **{one.__name__: one for one in (*_WATCHED, *_OTHERS, *_LAST)},
    **{how: partial(_raises, how) for how in ("raise", "warn", "skip")},
}
DEADLY: dict[str, Callable[[Path], Any]] = {"interrupted": interrupted, "alone": alone}


def main(folder: Path, devices: int, strategy: str, *names: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    fit.devices, fit.strategy = devices, strategy
    for name in names:
        try:
            found = (SCENARIOS | DEADLY)[name](folder / name)
        except (Exception, MisconfigurationException) as error:  # what became of it is what is looked at
            if name in DEADLY:
                raise
            found = f"{type(error).__name__}: {error}"
        torch.save(found, folder / f"{name}-{os.environ.get('LOCAL_RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
