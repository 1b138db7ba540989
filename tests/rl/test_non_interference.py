"""Training with observers ends in the same bits as training without."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from tdhook_train import Observer, ProbeSet
from tdhook_train.method import Method
from tdhook_train.rl.demo import methods_for, schedule
from tdhook_train.rl.observed_loss import ObservedLoss
from tdhook_train.rl.ppo import Ppo, make_ppo

FRAMES, PER_BATCH = 3000, 1000
ENVIRONMENTS = [pytest.param("CartPole-v1", marks=pytest.mark.slow), "InvertedDoublePendulum-v5"]


def hook_count(ppo: Ppo) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [m for root in (ppo.actor, ppo.critic, ppo.loss, ppo.advantage) for m in root.modules()]
    return sum(len(getattr(module, name)) for module in modules for name in names)


def everything(ppo: Ppo, batches: list[TensorDictBase]) -> dict[str, Any]:
    """All that a training leaves behind, as plain tensors and values."""
    return {
        "parameters": {name: p.detach().clone() for name, p in ppo.loss.named_parameters()},
        "buffers": {name: b.clone() for name, b in ppo.loss.named_buffers()},
        "optimizer": ppo.optimizer.state_dict(),
        "data": [batch.to_dict() for batch in batches],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],
        "python": random.getstate(),
    }


def identical(a: Any, b: Any) -> bool:
    """Bit for bit, through nested containers."""
    if isinstance(a, torch.Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return same_kind and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def train(ppo: Ppo, *, stop_after: Callable[[int], bool] = lambda _: False) -> list[TensorDictBase]:
    batches: list[TensorDictBase] = []
    before = ppo.collector.postproc
    ppo.collector.postproc = lambda td: batches.append(td.clone()) or (td if before is None else before(td))
    for progress in ppo.train():
        if stop_after(progress.frames):
            break
    ppo.close()
    return batches


def observe(ppo: Ppo, into: Path, methods: dict[str, Any] | None = None) -> Observer:
    probe_set = ProbeSet.first(ppo.collector, frames=PER_BATCH)
    observer = Observer(methods or methods_for(ppo), when=schedule(ppo.total_steps), into=into, on=probe_set)
    ppo.loss = ObservedLoss(ppo.loss, observer, optimizer=ppo.optimizer)
    return observer


def fresh(name: str) -> Ppo:
    random.seed(0)
    np.random.seed(0)
    return make_ppo(name, frames=FRAMES, seed=3, frames_per_batch=PER_BATCH)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_training_ends_in_the_same_bits_with_all_four_observers(name: str, tmp_path: Path) -> None:
    bare = fresh(name)
    expected = everything(bare, train(bare))

    watched = fresh(name)
    hooks = hook_count(watched)
    observer = observe(watched, tmp_path)
    found = everything(watched, train(watched))
    observer.finish()

    assert list(observer.buffer) == ["probe", "attribution", "patching", "health"]
    assert len(observer.buffer["probe"]) > 20  # it did observe
    for part, value in expected.items():
        assert identical(value, found[part]), part
    observer.close()
    assert hook_count(watched) == hooks
    assert not watched.optimizer._optimizer_step_post_hooks


def test_identical_can_fail() -> None:
    assert not identical({"a": torch.tensor([1.0])}, {"a": torch.tensor([1.0000001])})
    assert not identical({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])})


class Raising(Method):
    """Raises in the middle of a pass that edits the network."""

    def measure(self, seen: Any, model: Any) -> TensorDict:
        def explode(value: torch.Tensor) -> torch.Tensor:
            raise self.error()

        with model.run(seen.batch) as run:
            run.set(model.sites("**")[0], explode)
        return TensorDict()

    error = RuntimeError


class Interrupting(Raising):
    error = KeyboardInterrupt


@pytest.mark.parametrize("method", [Raising, Interrupting])
def test_nothing_is_left_when_a_tick_is_cut_short(method: type[Raising], tmp_path: Path) -> None:
    ppo = fresh("CartPole-v1")
    hooks = hook_count(ppo)
    observer = observe(ppo, tmp_path, {"bad": method()})
    modes = [module.training for module in ppo.loss.modules()]
    rng = torch.get_rng_state()
    batch = next(iter(ppo.collector)).reshape(-1)
    ppo.advantage(batch)
    rng = torch.get_rng_state()
    with pytest.raises(method.error):
        ppo.loss(batch)

    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in ppo.loss.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in ppo.loss.parameters())
    assert observer.subject is not None
    shadows = [m for network in observer.subject.networks.values() for m in network.module.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in shadows)
    assert len(observer.buffer) == 0  # no half row
    observer.close()
    assert hook_count(ppo) == hooks
    ppo.close()


def test_the_live_networks_are_never_run_for_a_measurement(tmp_path: Path) -> None:
    ppo = fresh("CartPole-v1")
    observer = observe(ppo, tmp_path)
    batch = next(iter(ppo.collector)).reshape(-1)
    ppo.advantage(batch)
    calls: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda module, *_: calls.append(module)) for m in ppo.critic.modules()]
    ppo.loss(batch)
    observed = len(calls)
    calls.clear()
    observer.close()
    ppo.loss(batch)
    assert observed == len(calls) > 0  # as many as the loss itself makes
    for handle in handles:
        handle.remove()
    ppo.close()
