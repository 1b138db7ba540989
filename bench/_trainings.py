"""Trainings that are advanced stretch by stretch: PPO, SAC and DQN, made of TorchRL's own parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.modules import (
    MLP,
    EGreedyModule,
    NormalParamExtractor,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import DQNLoss, SACLoss, SoftUpdate

from tdhook_train.attribution import IntegratedGradients
from tdhook_train.health import DeadUnits, DormantUnits, EffectiveRank
from tdhook_train.latent import ActivationPatching, RidgeProbe
from tdhook_train.method import Method
from tdhook_train.rl.demo import methods_for
from tdhook_train.rl.ppo import make_ppo

__all__ = ["MAKE", "Training"]

_WIDTH = [64, 64]


@dataclass
class Training:
    """A training, its parts, and what is asked of it.

    Args:
        loss: what is observed.
        optimizer: of it.
        collector: whose first frames become the probe set.
        methods: what is measured.
        frames: of the whole training.
        steps: optimizer steps of the whole training.
        loop: trains, and gives the frames so far after each batch; takes the training, whose loss may be observed.
    """

    loss: nn.Module
    optimizer: torch.optim.Optimizer
    collector: Collector
    methods: dict[str, Method | list[Method]]
    frames: int
    steps: int
    loop: Any
    extra: dict[str, Any] = field(default_factory=dict)

    def batches(self) -> Iterator[int]:
        """Train on."""
        return self.loop(self)


def ppo(frames: int) -> Training:
    """Make the demo's training."""
    made = make_ppo("InvertedDoublePendulum-v5", frames=frames, seed=0)

    def loop(training: Training) -> Iterator[int]:
        made.loss = training.loss
        for progress in made.train():
            yield progress.frames

    return Training(made.loss, made.optimizer, made.collector, methods_for(made), frames, made.total_steps, loop)


def sac(frames: int) -> Training:
    """Make SAC with two critics on Pendulum, one update a frame."""
    torch.manual_seed(0)
    env = GymEnv("Pendulum-v1")
    env.set_seed(0)
    net = nn.Sequential(MLP(3, 2, num_cells=_WIDTH), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        ["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -2, "high": 2},
    )
    critic = ValueOperator(MLP(4, 1, num_cells=_WIDTH), in_keys=["observation", "action"])
    loss = SACLoss(actor, critic, num_qvalue_nets=2, action_spec=env.action_spec)
    loss.make_value_estimator(gamma=0.99)
    methods: dict[str, Method | list[Method]] = {
        "probe": RidgeProbe(target={"speed": ("observation", 2), "cosine": ("observation", 0)}),
        "attribution": IntegratedGradients(targets=["loc", "state_action_value"], points=24, rows=64),
        "patching": ActivationPatching(pairs=32, networks="actor_network", targets=("loc", 0)),
        "health": [DormantUnits(), DeadUnits(), EffectiveRank()],
    }
    return _off_policy(loss, Collector(env, actor, **_collecting(frames)), methods, frames)


def dqn(frames: int) -> Training:
    """Make DQN on CartPole, one update a frame."""
    torch.manual_seed(0)
    env = GymEnv("CartPole-v1", categorical_action_encoding=False)
    env.set_seed(0)
    q = QValueActor(MLP(4, 2, num_cells=_WIDTH), in_keys=["observation"], spec=env.action_spec)
    explore = EGreedyModule(spec=env.action_spec, annealing_num_steps=frames // 2, eps_init=1.0, eps_end=0.05)
    loss = DQNLoss(q, action_space=env.action_spec, delay_value=True)
    loss.make_value_estimator(gamma=0.99)
    methods: dict[str, Method | list[Method]] = {
        "probe": RidgeProbe(target={"angle": ("observation", 2), "velocity": ("observation", 3)}),
        "attribution": IntegratedGradients(targets=["chosen_action_value"], points=24, rows=64),
        "patching": ActivationPatching(pairs=32, targets=("action_value", 0)),
        "health": [DormantUnits(), DeadUnits(), EffectiveRank()],
    }
    policy = TensorDictSequential(q, explore)
    training = _off_policy(loss, Collector(env, policy, **_collecting(frames)), methods, frames)
    training.extra["explore"] = explore
    return training


def _collecting(frames: int) -> dict[str, Any]:
    return {"frames_per_batch": 200, "total_frames": frames, "auto_register_policy_transforms": False}


def _off_policy(loss: nn.Module, collector: Collector, methods: Any, frames: int) -> Training:
    optimizer, targets = torch.optim.Adam(loss.parameters(), 3e-4), SoftUpdate(loss, tau=0.005)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=256)

    def loop(training: Training) -> Iterator[int]:
        seen = 0
        for data in collector:
            seen += data.numel()
            replay.extend(data.reshape(-1))
            if (explore := training.extra.get("explore")) is not None:
                explore.step(data.numel())
            for _ in range(data.numel()):
                losses = training.loss(replay.sample())
                optimizer.zero_grad()
                sum(value for name, value in losses.items() if name.startswith("loss")).backward()
                optimizer.step()
                targets.step()
            yield seen

    return Training(loss, optimizer, collector, methods, frames, frames, loop)


MAKE = {"PPO": ppo, "SAC": sac, "DQN": dqn}
