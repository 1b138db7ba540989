"""Networks and batches that the losses of the tests are made of, as small as they go."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl import modules as rl
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.model_based import DreamerEnv
from torchrl.modules.models.model_based import RSSMPosterior, RSSMPrior, RSSMRollout

ROWS, TIME, OBS, ACT, STATE, BELIEF, AGENTS = 6, 3, 3, 2, 4, 4, 3
LATENT, TRAJECTORY = ["state", "belief"], ["observation", "action", "return_to_go"]


def mlp(inputs: int, outputs: int, **options: Any) -> rl.MLP:
    return rl.MLP(inputs, outputs, num_cells=[4], activation_class=nn.Tanh, **options)


def normed(inputs: int, outputs: int) -> rl.MLP:
    """An MLP that keeps statistics of what it has seen."""
    return mlp(inputs, outputs, norm_class=rl.BatchRenorm1d, norm_kwargs={"num_features": 4})


def gaussian(net: nn.Sequential, reads: list[NestedKey], at: tuple[str, ...] = (), **options: Any) -> nn.Module:
    keys = {name: (*at, name) for name in ("loc", "scale")}
    return rl.ProbabilisticActor(
        TensorDictModule(net.append(rl.NormalParamExtractor()), reads, list(keys.values())),
        in_keys=keys,
        out_keys=[(*at, "action")],
        distribution_class=rl.TanhNormal,
        return_log_prob=True,
        **options,
    )


def actor() -> nn.Module:
    return gaussian(mlp(OBS, 2 * ACT), ["observation"], spec=Bounded(-1, 1, (ACT,)))


def discrete_actor() -> nn.Module:
    body = TensorDictModule(mlp(OBS, ACT), ["observation"], ["logits"])
    return rl.ProbabilisticActor(body, ["logits"], distribution_class=rl.OneHotCategorical, return_log_prob=True)


def deterministic_actor() -> nn.Module:
    return rl.Actor(mlp(OBS, ACT).append(nn.Tanh()), ["observation"], spec=Bounded(-1, 1, (ACT,)))


def value() -> nn.Module:
    return rl.ValueOperator(mlp(OBS, 1), in_keys=["observation"])


def q_value(outputs: int = 1, *, net: Callable[..., nn.Module] = mlp) -> nn.Module:
    return rl.ValueOperator(net(OBS + ACT, outputs), in_keys=["observation", "action"])


def q_values(gives: str = "action_value") -> nn.Module:
    return TensorDictModule(mlp(OBS, ACT), ["observation"], [gives])


def chooser() -> nn.Module:
    return rl.QValueActor(mlp(OBS, ACT), in_keys=["observation"], action_space="one-hot")


def agents(outputs: int, *, share: bool, centralized: bool = False) -> nn.Module:
    return rl.MultiAgentMLP(OBS, outputs, AGENTS, centralized=centralized, share_params=share, depth=1, num_cells=4)


def draws() -> Callable[..., Tensor]:
    return partial(torch.randn, generator=torch.Generator().manual_seed(1))


def ended(*shape: int) -> dict[str, Tensor]:
    return {name: torch.zeros(*shape, 1, dtype=torch.bool) for name in ("done", "terminated")}


def transitions(*, discrete: bool = False, **more: Tensor) -> TensorDict:
    """Draw what a collector and an advantage estimator give."""
    draw = draws()
    action = draw(ROWS, ACT)
    return TensorDict(
        observation=draw(ROWS, OBS),
        action=nn.functional.one_hot(action.argmax(-1), ACT) if discrete else action.tanh() * 0.9,
        action_log_prob=draw(ROWS),
        advantage=draw(ROWS, 1),
        value_target=draw(ROWS, 1),
        next=TensorDict(observation=draw(ROWS, OBS), reward=draw(ROWS, 1), **ended(ROWS), batch_size=[ROWS]),
        **more,
        batch_size=[ROWS],
    )


def team() -> TensorDict:
    """Draw what several agents of one team collect."""
    draw, of = draws(), partial(TensorDict, batch_size=[ROWS, AGENTS])
    last = {"agents": of({"observation": draw(ROWS, AGENTS, OBS)}), "state": draw(ROWS, OBS), "reward": draw(ROWS, 1)}
    names = {"observation": OBS, "action": 1}
    return TensorDict(
        agents=of(
            {n: draw(ROWS, AGENTS, k).tanh() for n, k in names.items()} | {"action_log_prob": draw(ROWS, AGENTS)}
        ),
        state=draw(ROWS, OBS),
        advantage=draw(ROWS, AGENTS, 1),
        value_target=draw(ROWS, AGENTS, 1),
        next=TensorDict(last | ended(ROWS), [ROWS]),
        batch_size=[ROWS],
    )


def sequences() -> TensorDict:
    """Draw what a world model or a transformer is trained on, ``[row, time]``."""
    draw, shape = draws(), (2, TIME)
    return TensorDict(
        {name: draw(*shape, k) for name, k in {"state": STATE, "belief": BELIEF, "observation": OBS}.items()}
        | {name: draw(*shape, 1) for name in ("lambda_target", "return_to_go")}
        | {"action": draw(*shape, ACT).tanh() * 0.9, "is_init": ended(*shape)["done"]}
        | {"next": {"pixels": draw(*shape, 1, 2, 2), "reward": draw(*shape, 1)} | ended(*shape)},
        shape,
    )


def ahead(*names: str) -> list[NestedKey]:
    return [("next", name) for name in names]


class Painted(nn.Module):
    """Pixels out of a latent state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(STATE + BELIEF, 4)

    def forward(self, *latents: Tensor) -> Tensor:
        return self.net(*latents).unflatten(-1, (1, 2, 2))


def latent_value() -> nn.Module:
    return TensorDictModule(mlp(STATE + BELIEF, 1), LATENT, ["state_value"])


def world(version: int) -> tuple[nn.Module, DreamerEnv]:
    """Make a world model, and the environment that imagines with its transition and its reward."""
    size, reward = {"rnn_hidden_dim": BELIEF, "obs_embed_dim": 4}, mlp(STATE + BELIEF, 1)
    if version == 1:
        prior = RSSMPrior(Unbounded((ACT,)), 4, BELIEF, STATE, action_dim=ACT)
        posterior, rollout, given = RSSMPosterior(4, STATE, **size), RSSMRollout, ["mean", "std"]
    else:
        classes = {"hidden_dim": 4, "num_categoricals": 2, "num_classes": STATE // 2}
        prior = rl.RSSMPriorV3(action_shape=(ACT,), rnn_hidden_dim=BELIEF, action_dim=ACT, **classes)
        posterior, rollout, given = rl.RSSMPosteriorV3(**classes, **size), rl.RSSMRolloutV3, ["logits"]
    step = TensorDictModule(prior, [*LATENT, "action"], ahead(*(f"prior_{n}" for n in given), *LATENT))
    correct = ahead(*(f"posterior_{n}" for n in given), "state")
    see = TensorDictSequential(
        TensorDictModule(nn.Sequential(nn.Flatten(-3), nn.Linear(4, 4)), ahead("pixels"), ahead("encoded")),
        rollout(step, TensorDictModule(posterior, ahead("belief", "encoded"), correct)),
        TensorDictModule(Painted(), ahead(*LATENT), ahead("reco_pixels")),
    )
    imagine = TensorDictModule(prior, step.in_keys, ["_"] * len(given) + LATENT)
    env = DreamerEnv(rl.WorldModelWrapper(imagine, TensorDictModule(reward, LATENT, ["reward"])), (STATE,), (BELIEF,))
    env.observation_spec = Composite(state=Unbounded(STATE), belief=Unbounded(BELIEF))
    env.state_spec = env.observation_spec.clone()
    env.action_spec, env.reward_spec = Bounded(-1, 1, (ACT,)), Unbounded((1,))
    return TensorDictSequential(see, TensorDictModule(reward, ahead(*LATENT), ahead("reward"))), env
