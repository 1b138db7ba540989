"""What collectors give out is the policy's own, whatever is measured of it meanwhile, and nothing outlives a run."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tiny import Drift, mlp, stochastic_actor
from torch import nn
from torchrl import modules as rl
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import ClipPPOLoss, DDPGLoss, LossModule

from tdhook_train import Every, Method, Observer, ProbeSet
from tdhook_train.attribution import IntegratedGradients
from tdhook_train.latent import RidgeProbe
from tdhook_train.rl import ObservedLoss

PER_BATCH, FRAMES = 20, 60


@dataclass(frozen=True)
class KnocksOut(Method):
    """What a network's first output loses without its first layer, by its value and by its weights, over and over."""

    meanwhile: Any = None  # called in the middle of that

    writes: ClassVar = {"change": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        def knocked_out(value: torch.Tensor) -> torch.Tensor:
            if self.meanwhile is not None:
                self.meanwhile()
            return torch.zeros_like(value)

        key, site, weight = model.out_keys[0], model.sites("**")[0], next(model.module.parameters())
        for _ in range(3):
            kept = weight.clone()
            weight.data.zero_()
            with model.run(seen.batch) as run:
                run.set(site, knocked_out)
            weight.data.copy_(kept)
        return TensorDict({"change": (run.output[key] - seen.batch[model.name, key]).abs().mean()})


class Fails(Exception):
    """What a method raises."""


@dataclass(frozen=True)
class Raises(Method):
    error: Any = Fails

    def measure(self, seen: Any, model: Any) -> TensorDict:
        with model.run(seen.batch) as run:
            run.set(model.sites("**")[0], self._explode)
        return TensorDict()

    def _explode(self, value: torch.Tensor) -> torch.Tensor:
        raise self.error


def deterministic() -> tuple[nn.Module, LossModule]:
    torch.manual_seed(0)
    actor = rl.Actor(nn.Sequential(mlp(2, 1), nn.Tanh()), ["observation"], spec=Bounded(-1, 1, (1,)))
    loss = DDPGLoss(actor, rl.ValueOperator(mlp(3, 1), in_keys=["observation", "action"]), delay_actor=True)
    loss.make_value_estimator(gamma=0.9)
    return actor, loss


def stochastic() -> tuple[nn.Module, LossModule]:
    torch.manual_seed(0)
    actor = stochastic_actor()
    return actor, ClipPPOLoss(actor, rl.ValueOperator(mlp(2, 1), in_keys=["observation"]))


def states() -> TensorDict:
    drawn = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    return TensorDict(observation=drawn, action=drawn[:, :1].tanh(), batch_size=[16])


def observing(into: Any, **methods: Any) -> Observer:
    return Observer(methods, when=Every(optim_steps=1), into=into, on=ProbeSet(states(), groups="rows"))


@contextmanager
def leaving_nothing(collector: Any, loss: nn.Module, *optimizers: Any) -> Iterator[None]:
    """Find hooks, threads, processes and the collector's slot for batches as they were."""

    def found() -> tuple[Any, ...]:
        networks = [value for value in vars(loss).values() if isinstance(value, nn.Module)]
        parts = [part for root in (loss, *networks) for part in root.modules()]
        hooks = [len(hooks) for part in parts for name, hooks in vars(part).items() if name.endswith("_hooks")]
        return hooks, [len(o._optimizer_step_post_hooks) for o in optimizers], collector.postproc

    before, threads = found(), set(threading.enumerate())
    yield
    assert found() == before
    collector.shutdown()
    assert set(threading.enumerate()) <= threads
    assert not multiprocessing.active_children()


def of_the_policy(frames: TensorDictBase, policy: nn.Module) -> bool:
    """Whether each frame holds what the policy gives for it, frame by frame as a collector calls it."""
    with torch.no_grad():
        given = [policy(TensorDict(observation=row, batch_size=[])) for row in frames["observation"].reshape(-1, 2)]
    return torch.equal(torch.stack([td["action"] for td in given]), frames["action"].reshape(-1, 1))


def in_a_thread(policy: nn.Module) -> Collector:
    return Collector(
        Drift(),
        policy,
        frames_per_batch=PER_BATCH,
        total_frames=-1,
        replay_buffer=TensorDictReplayBuffer(storage=LazyTensorStorage(100_000), batch_size=8),
        auto_register_policy_transforms=False,
    )


def observed_beside(collector: Collector, loss: LossModule, into: Any) -> tuple[TensorDictBase, torch.Tensor]:
    """Measure while a thread collects, and it while what is measured is edited; return what it collected."""

    def two_batches() -> None:  # the second of which began after the call
        until = collector.replay_buffer.write_count + 2 * PER_BATCH
        while collector.replay_buffer.write_count < until:
            pass

    method = KnocksOut(networks="actor_network", meanwhile=two_batches)
    with observing(into, knocks=method, attribution=IntegratedGradients(targets=["action"])) as observer:
        collector.start()
        observer.step(loss, step=1)
        collector.async_shutdown(close_env=False)
        return collector.replay_buffer[:], observer.buffer["knocks"].at(1)["actor_network", "change"]


@pytest.mark.slow  # two threads share a core, or wait for each other's
def test_frames_of_a_thread_that_collects_are_the_live_policys_own(tmp_path):
    policy, loss = deterministic()
    collector = in_a_thread(policy)
    with leaving_nothing(collector, loss):
        frames, change = observed_beside(collector, loss, tmp_path)
    assert len(frames) >= 6 * PER_BATCH
    assert of_the_policy(frames, policy)
    assert change > 0.01  # what was measured acts otherwise


@pytest.mark.slow  # two threads share a core, or wait for each other's
def test_a_policy_that_collects_in_a_thread_goes_on_exploring(tmp_path):
    policy, loss = stochastic()
    collector = in_a_thread(policy)
    with leaving_nothing(collector, loss):
        frames, _ = observed_beside(collector, loss, tmp_path)
    noise = (frames["action"].double().atanh() - frames["loc"]) / frames["scale"]
    assert not torch.isclose(noise, torch.zeros(()).double(), atol=1e-6).any()


def many(kind: type[Any], policy: nn.Module, **options: Any) -> Any:
    return kind([Drift] * 2, policy, frames_per_batch=PER_BATCH, total_frames=FRAMES, num_threads=1, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MultiSyncCollector, MultiAsyncCollector])
def test_frames_of_processes_that_collect_are_the_policys_own(kind, tmp_path):
    policy, loss = deterministic()
    collector = many(kind, policy)
    batches, frames = iter(collector), []
    method = KnocksOut(networks="actor_network", meanwhile=lambda: frames.append(next(batches).clone()))
    with leaving_nothing(collector, loss), observing(tmp_path, knocks=method) as observer:
        observer.step(loss, step=1)
        assert observer.buffer["knocks"].steps.tolist() == [1]
    assert len(frames) == 3
    assert all(of_the_policy(batch, policy) for batch in frames)  # whose weights the processes share


def trained(into: Any, *, observed: bool) -> tuple[list[torch.Tensor], Observer | None]:
    """Train on what two processes collect, weights sent after each batch."""
    policy, loss = deterministic()
    collector = many(MultiSyncCollector, policy)
    collector.set_seed(0)
    optimizer = torch.optim.SGD(loss.parameters(), 0.1)
    observer = None
    if observed:
        observer = observing(into, knocks=KnocksOut())
        loss = ObservedLoss(loss, observer, optimizer)
    kept = []
    for frames in collector:
        kept.append(frames["observation"].clone())
        losses = loss(frames.reshape(-1))
        (losses["loss_actor"] + losses["loss_value"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        collector.update_policy_weights_()
    collector.shutdown()
    return [*kept, *loss.state_dict().values(), torch.get_rng_state()], observer


@pytest.mark.slow
def test_training_on_what_processes_collect_ends_in_the_same_bits(tmp_path):
    expected, _ = trained(tmp_path, observed=False)
    found, observer = trained(tmp_path, observed=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert observer is not None
    assert observer.buffer["knocks"].steps.tolist() == [1, 2]
    observer.close()


def train(collector: Any, loss: LossModule, optimizer: torch.optim.Optimizer) -> None:
    """Train until somebody presses Ctrl-C in the second batch."""
    for step, frames in enumerate(collector):
        losses = loss(frames.reshape(-1))
        (losses["loss_actor"] + losses["loss_value"]).backward()
        optimizer.step()
        if step:
            raise KeyboardInterrupt


def cut_short(collector: Any, loss: LossModule, into: Any, method: Method) -> None:
    optimizer = torch.optim.SGD(loss.parameters(), 0.1)
    with leaving_nothing(collector, loss, optimizer):
        on = {"first": ProbeSet.first(collector, frames=10_000), "now": "batch"}  # the first still listens at the end
        with Observer({"m": method}, when=Every(optim_steps=1), into=into, on=on) as observer:
            ObservedLoss(loss, observer, optimizer)
            with pytest.raises(getattr(method, "error", KeyboardInterrupt)):
                train(collector, loss, optimizer)


ENDS = [
    pytest.param(Raises(), id="a method that raises"),
    pytest.param(Raises(error=KeyboardInterrupt), id="ctrl-c in a pass"),
    pytest.param(RidgeProbe(target="action", shifts=0), id="ctrl-c in the loop"),
]


@pytest.mark.parametrize("method", ENDS)
def test_nothing_outlives_a_run_that_is_cut_short(method, tmp_path):
    policy, loss = deterministic()
    collector = Collector(
        Drift(), policy, frames_per_batch=PER_BATCH, total_frames=FRAMES, auto_register_policy_transforms=False
    )
    cut_short(collector, loss, tmp_path, method)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MultiSyncCollector, MultiAsyncCollector])
def test_no_process_outlives_a_run_that_is_cut_short(kind, tmp_path):
    policy, loss = deterministic()
    cut_short(many(kind, policy), loss, tmp_path, Raises(error=KeyboardInterrupt))
