"""TorchRL's own PPO, SAC, DQN and TD3 trainers, observed by either front door."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from tiny import BATCHES, PER_BATCH, TRAINERS, make
from torch import Tensor, nn
from torchrl.record.loggers.csv import CSVLogger

from tdhook_train import At, Every, Method, Observer, ProbeSet
from tdhook_train.errors import RunExistsError
from tdhook_train.health import EffectiveRank
from tdhook_train.rl import ObservedLoss, ObserverHook, networks

# torchrl 0.14 says so of its own trainers
pytestmark = pytest.mark.filterwarnings("ignore:The '(optimizer|post_loss)' hook stage will be replaced:FutureWarning")

LEARNS = {"ppo": "actor_network", "sac": "qvalue_network.0", "dqn": "value_network", "td3": "target_actor_network"}
BY_LOSS = [name for name in TRAINERS if name != "td3"]  # whose trainer never calls the loss itself
DUE = Every(optim_steps=2) | At(0)
AFTER = 2  # batches after which a run is saved


@dataclass(frozen=True)
class Sum(Method):
    """The sum of a network's weights: tells which were measured."""

    writes: ClassVar = {"sum": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return TensorDict({"sum": total(model.module.parameters())})


def total(weights: Any) -> Tensor:
    return torch.stack([weight.detach().double().sum() for weight in weights]).sum()


def weights_of(loss: nn.Module, name: str) -> Tensor:
    """Add up the weights that a loss trains under a network's name, by its own attributes alone."""
    first, _, member = name.partition(".")
    params = loss._modules[f"{first}_params"].data
    return total((params[int(member)] if member else params).flatten_keys().values())


def methods(name: str) -> dict[str, Any]:
    return {"sum": Sum(networks=LEARNS[name]), "rank": EffectiveRank()}


def watch(trainer: Any, name: str) -> tuple[list[Tensor], list[int]]:
    """Note, before each optimizer step, what the network weighs, and how many frames were collected."""
    sums: list[Tensor] = []
    frames: list[int] = []

    def note(_: Any) -> None:
        sums.append(weights_of(trainer.loss_module, LEARNS[name]))
        frames.append(trainer.collected_frames)

    trainer.register_op("process_optim_batch", note)
    return sums, frames


def left_behind(trainer: Any) -> list[Tensor]:
    """All that a training leaves: weights and targets, moments, what was collected, random states."""
    stepper = trainer.optimization_stepper
    states = trainer.optimizer.state_dict() if stepper is None else stepper.state_dict()
    kept = [*trainer.loss_module.state_dict().values(), *tensors(states)]
    collected = trainer.replay_buffer[:].exclude(("collector", "traj_ids"))  # which a resumed run numbers anew
    return [*kept, *(collected[key] for key in sorted(collected.keys(True, True), key=str)), torch.get_rng_state()]


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def observe(trainer: Any, observer: Observer, door: str) -> None:
    if door == "hook":
        ObserverHook(observer).register(trainer)
    else:
        ObservedLoss(trainer.loss_module, observer, trainer.optimizer)


def hooks_on(trainer: Any) -> int:
    stepper, loss = trainer.optimization_stepper, trainer.loss_module
    optimizers = [trainer.optimizer] if stepper is None else [stepper.optimizer_actor, stepper.optimizer_critic]
    return len(loss._forward_pre_hooks) + sum(len(o._optimizer_step_post_hooks) for o in optimizers)


DOORS = [*[(name, "loss") for name in BY_LOSS], *[(name, "hook") for name in TRAINERS]]


@pytest.mark.parametrize(("name", "door"), DOORS)
def test_training_ends_in_the_same_bits_and_rows_hold_the_weights_of_their_steps(name, door, tmp_path):
    bare = make(name)
    sums, frames = watch(bare, name)
    bare.train()
    expected = left_behind(bare)
    sums.append(weights_of(bare.loss_module, LEARNS[name]))
    assert not torch.equal(sums[0], sums[-1])

    trainer = make(name)
    before = hooks_on(trainer)
    with Observer(methods(name), when=DUE, into=tmp_path) as observer:
        observe(trainer, observer, door)
        trainer.train()
        observer.finish()
        rows = observer.buffer["sum"]
        due = [step for step in range(len(sums)) if step % 2 == 0 or step == len(sums) - 1]
        assert rows.steps.tolist() == due
        assert torch.equal(rows.series((LEARNS[name], "sum")), torch.stack(sums)[due])
        if door == "hook":
            assert rows.series(("meta", "frames")).tolist() == [[*frames, frames[-1]][step] for step in due]
    assert same(left_behind(trainer), expected)
    assert hooks_on(trainer) == before


@pytest.mark.parametrize("name", TRAINERS)
def test_scalars_reach_the_trainers_logger_and_its_progress_bar(name, tmp_path):
    logger = CSVLogger("told", log_dir=str(tmp_path / "log"))
    trainer = make(name, logger=logger, progress_bar=True)
    with Observer({"rank": EffectiveRank()}, when=DUE, into=tmp_path / "run") as observer:
        ObserverHook(observer, log_pbar=True).register(trainer)
        last: dict[int, float] = {}  # what was measured last when a batch was done
        trainer.register_op(
            "post_steps",
            lambda: last.update({trainer.collected_frames: means(observer, first_network(trainer))[-1]}),
        )
        trainer.train()
    network = first_network(trainer)
    (written,) = (
        path for path in (tmp_path / "log").rglob("*.csv") if str(path).endswith(f"effective_rank/{network}.csv")
    )
    lines = [(int(float(step)), float(value)) for step, value in csv.reader(written.open())]
    assert lines == [(frames, pytest.approx(value)) for frames, value in last.items()]
    assert [frames for frames, _ in lines] == [PER_BATCH * (i + 1) for i in range(BATCHES)]
    assert f"rank/effective_rank/{network}: {lines[-1][1]:4.4f}" in trainer._pbar.desc
    trainer._pbar.close()


def first_network(trainer: Any) -> str:
    return next(iter(networks(trainer.loss_module)))


def means(observer: Observer, network: str) -> list[float]:
    rows = observer.buffer["rank"]
    own = [i for i, layer in enumerate(rows.coords["layer"]) if layer.startswith(f"{network}.")]
    return rows.series("effective_rank")[:, own].double().mean(1).tolist()


class Power(Exception):
    """What ends a run between two checkpoints."""


def saved(trainer: Any, path: Path, *, fails: bool) -> None:
    """Save after some batches, and fail during the one after next."""
    batches: list[int] = []

    def save() -> None:
        batches.append(1)
        if len(batches) == AFTER:
            trainer._sync_checkpoint_components().save(path)

    def fail() -> None:
        if fails and len(batches) == AFTER + 1:
            raise Power

    trainer.register_op("post_steps", save)
    trainer.register_op("post_optim", fail)


def sources() -> dict[str, Any]:
    states = torch.randn(12, 2, generator=torch.Generator().manual_seed(2))
    fixed = TensorDict(observation=states, action=states[:, :1].tanh(), batch_size=[12])
    return {"now": "batch", "fixed": ProbeSet(fixed, groups="rows")}


def begin(name: str, door: str, into: Path, **options: Any) -> tuple[Any, Observer]:
    """Build a trainer whose checkpoints hold the observer's state."""
    trainer = make(name)
    observer = Observer(methods(name), when=DUE, into=into, on=sources(), **options)
    observe(trainer, observer, door)
    if door == "loss":
        trainer.checkpoint.register("observer", observer)
    return trainer, observer


def rows_of(observer: Observer) -> dict[str, Tensor]:
    """All that rows hold, but for what tells one attempt from another."""
    found = {}
    for row in observer.buffer:
        values = observer.buffer[row][:].exclude(*[("meta", key) for key in ("time", "cost", "attempt")])
        if row.endswith(".now"):  # in which the numbers of trajectories are
            values = values.exclude(("meta", "data"))
        found |= {f"{row}/{key}": value for key, value in values.items(True, True)}
    return found


@pytest.mark.parametrize(("name", "door"), DOORS)
def test_a_run_resumed_from_a_checkpoint_gives_the_rows_of_one_that_was_never_interrupted(name, door, tmp_path):
    whole, observer = begin(name, door, tmp_path / "whole")
    _, frames = watch(whole, name)
    saved(whole, tmp_path / "unused", fails=False)
    with observer:
        whole.train()
        observer.finish()
        expected = rows_of(observer)
    end, done = left_behind(whole), sum(count <= AFTER * PER_BATCH for count in frames)

    cut, observer = begin(name, door, tmp_path / "run")
    saved(cut, tmp_path / "checkpoint", fails=True)
    with observer, pytest.raises(Power):
        cut.train()
    assert max(observer.buffer["sum.now"].steps.tolist()) > done
    cut.collector.shutdown()

    resumed, observer = begin(name, door, tmp_path / "run", resume=True)
    with observer:
        resumed.load_from_file(tmp_path / "checkpoint")
        resumed._greedy_last_frames = resumed.collected_frames  # which torchrl 0.14 does not save
        assert observer.steps_taken == done
        assert observer.buffer["sum.now"].steps.tolist() == list(range(0, done, 2))
        resumed.train()
        observer.finish()
        found = rows_of(observer)
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in expected.items()}
    assert same(left_behind(resumed), end)


def test_a_run_that_begins_anew_is_not_mixed_with_the_one_before(tmp_path):
    trainer, observer = begin("dqn", "hook", tmp_path)
    with observer:
        trainer.train()
    trainer, observer = begin("dqn", "hook", tmp_path, resume=True)
    with observer, pytest.raises(RunExistsError, match="restore the observer by load_state_dict"):
        trainer.train()
    trainer.collector.shutdown()
