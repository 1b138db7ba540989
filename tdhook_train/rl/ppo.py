"""A small PPO training made of TorchRL's own parts: what the demo, the tests and the benchmark train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import Compose, DoubleToFloat, EnvBase, GymEnv, RewardSum, StepCounter, TransformedEnv
from torchrl.modules import MLP, NormalParamExtractor, OneHotCategorical, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from tdhook_train.errors import EnvironmentNameError, MissingPackageError, SettingsError, did_you_mean

__all__ = ["FEATURES", "Ppo", "Progress", "make_env", "make_ppo"]

FEATURES: dict[str, list[str]] = {
    "InvertedDoublePendulum-v5": [
        "cart position",
        "sin hinge 1",
        "sin hinge 2",
        "cos hinge 1",
        "cos hinge 2",
        "cart velocity",
        "hinge 1 velocity",
        "hinge 2 velocity",
        "constraint force",
    ],
    "CartPole-v1": ["cart position", "cart velocity", "pole angle", "pole velocity"],
}
"""What the entries of an environment's observation are, as its documentation has them."""

_EPOCHS = 10
_MINIBATCH = 64
_FRAMES_PER_BATCH = 2500


@dataclass(frozen=True)
class Progress:
    """One collected batch, trained on."""

    frames: int
    steps: int
    returns: list[float]  # of the episodes that ended in the batch


@dataclass
class Ppo:
    """A PPO training: its parts, and the loop over them."""

    env: EnvBase
    collector: Collector
    actor: ProbabilisticActor
    critic: ValueOperator
    loss: ClipPPOLoss
    advantage: GAE
    optimizer: torch.optim.Optimizer
    replay: TensorDictReplayBuffer
    features: list[str]
    discrete: bool
    total_frames: int
    frames_per_batch: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return math.ceil(self.total_frames / self.frames_per_batch) * _EPOCHS * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over a batch."""
        return max(self.frames_per_batch // _MINIBATCH, 1)

    def train(self, on_batch: Any = None) -> Iterator[Progress]:
        """Collect and train, batch by batch; ``on_batch(frames)`` is told the frames collected before training."""
        frames = steps = 0
        for data in self.collector:
            frames += data.numel()
            if on_batch is not None:
                on_batch(frames)
            for _ in range(_EPOCHS):
                with torch.no_grad():
                    self.advantage(data)
                self.replay.extend(data.reshape(-1))
                for _ in range(self.steps_per_epoch):
                    self.update(self.replay.sample())
                    steps += 1
            done = data["next", "done"]
            yield Progress(frames, steps, data["next", "episode_reward"][done].tolist())

    def update(self, batch: TensorDictBase) -> None:
        """Take one optimizer step."""
        losses = self.loss(batch)
        total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), 1.0)
        self.optimizer.step()

    def close(self) -> None:
        """End the collector and its environment."""
        self.collector.shutdown()


def make_env(name: str) -> EnvBase:
    """Make a gymnasium environment by its id, with float observations and the return of each episode.

    Raises:
        EnvironmentNameError: no such id; names the nearest.
        MissingPackageError: the environment needs a package that is not installed.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise MissingPackageError('environments need gymnasium: pip install "tdhook-train[mujoco]"') from error
    try:
        gymnasium.spec(name)
    except gymnasium.error.Error as error:
        known = did_you_mean(name, gymnasium.registry)
        raise EnvironmentNameError(f"no environment {name!r} is registered with gymnasium{known}") from error
    try:
        env = GymEnv(name)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        install = 'pip install "tdhook-train[mujoco]"'
        raise MissingPackageError(f"{name} needs a package that is not installed: {error} Try {install}") from error
    return TransformedEnv(env, Compose(DoubleToFloat(), StepCounter(), RewardSum()))


def make_ppo(name: str, *, frames: int, seed: int = 0, frames_per_batch: int | None = None) -> Ppo:
    """Put the training together; policy and value are MLPs of 6 hidden layers of 32 tanh units.

    Args:
        name: environment id.
        frames: environment frames in all.
        seed: of torch and of the environment.
        frames_per_batch: frames between trainings; about 2,500 by default.

    Raises:
        SettingsError: too few frames to train on.
    """
    if frames < _MINIBATCH:
        raise SettingsError(f"PPO needs at least {_MINIBATCH} frames, got {frames}")
    per_batch = frames_per_batch or math.ceil(frames / max(round(frames / _FRAMES_PER_BATCH), 1))
    torch.manual_seed(seed)
    env = make_env(name)
    env.set_seed(seed)
    actor, discrete = _actor(env)
    width = env.observation_spec["observation"].shape[-1]
    critic = ValueOperator(_mlp(width, 1), in_keys=["observation"])
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=1e-3, critic_coeff=0.5, normalize_advantage=True)
    return Ppo(
        env=env,
        collector=Collector(
            env, actor, frames_per_batch=per_batch, total_frames=frames, auto_register_policy_transforms=False
        ),
        actor=actor,
        critic=critic,
        loss=loss,
        advantage=GAE(gamma=0.99, lmbda=0.95, value_network=critic),
        optimizer=torch.optim.Adam(loss.parameters(), lr=1e-3),
        replay=TensorDictReplayBuffer(
            storage=LazyTensorStorage(per_batch),
            sampler=SamplerWithoutReplacement(),
            batch_size=min(_MINIBATCH, per_batch),
        ),
        features=FEATURES.get(name, [f"observation {i}" for i in range(width)]),
        discrete=discrete,
        total_frames=frames,
        frames_per_batch=per_batch,
    )


def _mlp(inputs: int, outputs: int) -> MLP:
    return MLP(inputs, outputs, depth=6, num_cells=32, activation_class=nn.Tanh)


def _actor(env: EnvBase) -> tuple[ProbabilisticActor, bool]:
    width = env.observation_spec["observation"].shape[-1]
    actions = env.action_spec.shape[-1]
    if env.action_spec.domain == "discrete":
        net = TensorDictModule(_mlp(width, actions), in_keys=["observation"], out_keys=["logits"])
        keys, distribution = ["logits"], OneHotCategorical
    else:
        body = nn.Sequential(_mlp(width, 2 * actions), NormalParamExtractor())
        net = TensorDictModule(body, in_keys=["observation"], out_keys=["loc", "scale"])
        keys, distribution = ["loc", "scale"], TanhNormal
    actor = ProbabilisticActor(
        net, in_keys=keys, spec=env.action_spec, distribution_class=distribution, return_log_prob=True
    )
    return actor, distribution is OneHotCategorical
