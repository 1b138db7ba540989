"""An environment of two numbers, and TorchRL's own trainers on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl import modules as rl
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, LazyTensorStorage, OneHot, TensorDictReplayBuffer, Unbounded
from torchrl.data.replay_buffers import RandomSampler, SamplerWithoutReplacement
from torchrl.envs import EnvBase
from torchrl.objectives import ClipPPOLoss, DQNLoss, SACLoss, SoftUpdate, TD3Loss
from torchrl.trainers import Trainer
from torchrl.trainers.algorithms import DQNTrainer, PPOTrainer, SACTrainer
from torchrl.trainers.algorithms.td3 import TD3OptimizationStepper, TD3Trainer

PER_BATCH, BATCHES, STEPS = 20, 4, 3  # frames of a batch, batches, optimizer steps a batch


class Drift(EnvBase):
    """Two numbers that an action pushes; an episode ends after seven steps, and begins at a random place."""

    def __init__(self, *, discrete: bool = False) -> None:
        super().__init__(device="cpu", batch_size=[])
        self.observation_spec = Composite(observation=Unbounded((2,)), count=Unbounded((1,), dtype=torch.int64))
        self.action_spec = OneHot(2) if discrete else Bounded(-1, 1, (1,))
        self.reward_spec = Unbounded((1,))
        self.full_done_spec = Composite(done=Categorical(2, (1,), dtype=torch.bool))

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        return TensorDict(observation=torch.randn(2), count=torch.zeros(1, dtype=torch.int64), **_not_done())

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        push = tensordict["action"].float().sum() - tensordict["action"].float()[:1]
        observation = 0.9 * tensordict["observation"] + 0.1 * push + 0.1 * torch.randn(2)
        count = tensordict["count"] + 1
        over = count >= 7
        return TensorDict(
            observation=observation, count=count, reward=-observation.norm().reshape(1), done=over, terminated=over
        )

    def _set_seed(self, seed: int | None) -> None:
        pass  # it draws from torch's generator, as the policy does


def _not_done() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1, dtype=torch.bool) for name in ("done", "terminated")}


def mlp(inputs: int, outputs: int) -> rl.MLP:
    return rl.MLP(inputs, outputs, num_cells=[4], activation_class=nn.Tanh)


def stochastic_actor() -> nn.Module:
    net = TensorDictModule(nn.Sequential(mlp(2, 2), rl.NormalParamExtractor()), ["observation"], ["loc", "scale"])
    return rl.ProbabilisticActor(
        net, ["loc", "scale"], distribution_class=rl.TanhNormal, return_log_prob=True, spec=Bounded(-1, 1, (1,))
    )


def collector_of(policy: nn.Module, *, discrete: bool = False) -> Collector:
    return Collector(
        Drift(discrete=discrete),
        policy,
        frames_per_batch=PER_BATCH,
        total_frames=PER_BATCH * BATCHES,
        reset_at_each_iter=True,  # so that a run can be resumed between batches: the environment holds nothing
        auto_register_policy_transforms=False,
    )


def replay(sampler: Any, frames: int = PER_BATCH * BATCHES) -> TensorDictReplayBuffer:
    return TensorDictReplayBuffer(storage=LazyTensorStorage(frames), sampler=sampler, batch_size=6)


def _options(loss: nn.Module, collector: Collector, *, learns: bool = True, **options: Any) -> dict[str, Any]:
    given = {"optimizer": torch.optim.Adam(loss.parameters(), 0.05)} if learns else {}
    return given | {
        "collector": collector,
        "loss_module": loss,
        "total_frames": PER_BATCH * BATCHES,
        "frame_skip": 1,
        "optim_steps_per_batch": STEPS,
        "progress_bar": False,
        "log_interval": 1,
        "checkpoint": Checkpoint(rng=GlobalRNGState()),
        **options,
    }


def ppo(**options: Any) -> Trainer:
    actor = stochastic_actor()
    loss = ClipPPOLoss(actor, rl.ValueOperator(mlp(2, 1), in_keys=["observation"]))
    given = _options(
        loss, collector_of(actor), num_epochs=1, replay_buffer=replay(SamplerWithoutReplacement(), PER_BATCH)
    )
    return PPOTrainer(**given | options)


def sac(**options: Any) -> Trainer:
    actor = stochastic_actor()
    loss = SACLoss(actor, rl.ValueOperator(mlp(3, 1), in_keys=["observation", "action"]), num_qvalue_nets=2)
    loss.make_value_estimator(gamma=0.9)
    targets = SoftUpdate(loss, tau=0.1)
    given = _options(loss, collector_of(actor), replay_buffer=replay(RandomSampler()), target_net_updater=targets)
    return SACTrainer(episode_reward_key="reward", **given | options)


def dqn(**options: Any) -> Trainer:
    actor = rl.QValueActor(mlp(2, 2), in_keys=["observation"], spec=OneHot(2))
    greedy = rl.EGreedyModule(spec=OneHot(2), annealing_num_steps=PER_BATCH * BATCHES)
    loss = DQNLoss(actor, action_space="one-hot")
    loss.make_value_estimator(gamma=0.9)
    targets = SoftUpdate(loss, tau=0.1)
    collector = collector_of(TensorDictSequential(actor, greedy), discrete=True)
    given = _options(loss, collector, replay_buffer=replay(RandomSampler()), target_net_updater=targets)
    return DQNTrainer(greedy_module=greedy, episode_reward_key="reward", **given | options)


def td3(**options: Any) -> Trainer:
    actor = rl.Actor(nn.Sequential(mlp(2, 1), nn.Tanh()), ["observation"], spec=Bounded(-1, 1, (1,)))
    critic = rl.ValueOperator(mlp(3, 1), in_keys=["observation", "action"])
    loss = TD3Loss(actor, critic, bounds=(-1, 1))
    loss.make_value_estimator(gamma=0.9)
    targets = SoftUpdate(loss, tau=0.1)
    parts = [
        torch.optim.Adam(getattr(loss, f"{name}_network_params").flatten_keys().values(), 0.05)
        for name in ("actor", "qvalue")
    ]
    given = _options(loss, collector_of(actor), learns=False, replay_buffer=replay(RandomSampler()))
    return TD3Trainer(
        optimization_stepper=TD3OptimizationStepper(*parts, policy_update_delay=2),
        target_net_updater=targets,
        **given | options,
    )


TRAINERS: dict[str, Callable[..., Trainer]] = {"ppo": ppo, "sac": sac, "dqn": dqn, "td3": td3}


def make(name: str, **options: Any) -> Trainer:
    """Build a trainer from a fixed seed."""
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="experimental/prototype"):
        return TRAINERS[name](**options)
