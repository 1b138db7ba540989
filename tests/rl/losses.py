"""Every loss that TorchRL exports, as small as it goes, with a batch that it takes and the networks that it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from loss_parts import (
    ACT,
    AGENTS,
    BELIEF,
    LATENT,
    OBS,
    ROWS,
    STATE,
    TIME,
    TRAJECTORY,
    actor,
    agents,
    ahead,
    chooser,
    deterministic_actor,
    discrete_actor,
    draws,
    gaussian,
    latent_value,
    mlp,
    normed,
    q_value,
    q_values,
    sequences,
    team,
    transitions,
    value,
    world,
)
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl import modules as rl
from torchrl import objectives
from torchrl.modules.models import ACTModel
from torchrl.objectives import SoftUpdate

REFUSED = ("ExponentialQuadraticCost",)  # without a network


@dataclass(frozen=True)
class Case:
    """One loss.

    Args:
        loss: freshly built from a fixed seed.
        batch: what it is called with.
        names: of its networks.
        inputs: what of the batch a network reads, where the module does not say.
        needs: the networks that the batch alone cannot feed, each with the key that it lacks.
        lacking: values for those keys.
        error: what is said of a loss without a network.
        updaters: of its targets.
    """

    loss: nn.Module
    batch: TensorDict
    names: frozenset[str]
    inputs: Mapping[str, NestedKey] = field(default_factory=dict)
    needs: Mapping[str, NestedKey] = field(default_factory=dict)
    lacking: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    updaters: tuple[SoftUpdate, ...] = ()

    @property
    def complete(self) -> TensorDict:
        """A batch that feeds every network."""
        return self.batch.clone().update(self.lacking)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Take one step, as a training loop would."""
        out = self.loss(self.batch.clone())
        losses = out[0] if isinstance(out, tuple) else out  # Dreamer's give their rollout as well
        sum(value.sum() for name, value in losses.items() if name.startswith("loss")).backward()
        optimizer.step()
        optimizer.zero_grad()
        for updater in self.updaters:
            updater.step()


def case(loss: nn.Module, batch: TensorDict, *names: str, **known: Any) -> Case:
    targets = any(f"{name.partition('.')[0]}_params" in loss._modules for name in names if name.startswith("target_"))
    known.setdefault("updaters", (SoftUpdate(loss, tau=0.5),) if targets else ())
    if loss.default_value_estimator is not None:
        loss.make_value_estimator(gamma=0.9)
    return Case(loss, batch, frozenset(names), **known)


def both(*names: str) -> list[str]:
    """Name networks and their targets."""
    return [f"{prefix}{name}" for prefix in ("", "target_") for name in names]


def members(name: str = "qvalue_network", count: int = 2) -> list[str]:
    return [f"{name}.{i}" for i in range(count)]


def on_policy(kind: type[nn.Module], **options: Any) -> Case:
    collected = {"loc": torch.zeros(ROWS, ACT), "scale": torch.ones(ROWS, ACT)}  # by the policy of then
    return case(kind(actor(), value(), **options), transitions(**collected), "actor_network", "critic_network")


def shared_trunk() -> Case:
    trunk = TensorDictModule(mlp(OBS, OBS), ["observation"], ["hidden"])
    heads = gaussian(mlp(OBS, 2 * ACT), ["hidden"]), rl.ValueOperator(mlp(OBS, 1), in_keys=["hidden"])
    both_of = rl.ActorValueOperator(trunk, *heads)
    loss = objectives.ClipPPOLoss(both_of.get_policy_operator(), both_of.get_value_operator(), separate_losses=True)
    return case(loss, transitions(), "actor_network", "critic_network")


def soft(kind: type[nn.Module], q: nn.Module, *, count: int = 2, targets: bool = True, **options: Any) -> Case:
    loss = kind(actor(), q, num_qvalue_nets=count, target_entropy=-float(ACT), **options)
    critics = members(count=count)
    return case(loss, transitions(), "actor_network", *(both(*critics) if targets else critics))


def soft_with_value() -> Case:
    loss = objectives.SACLoss(actor(), q_value(), value(), target_entropy=-float(ACT))
    return case(loss, transitions(), "actor_network", *both("value_network", *members()))


def twin_delayed(kind: type[nn.Module], q: Any = None) -> Case:
    loss = kind(deterministic_actor(), q or q_value(), bounds=(-1, 1))
    return case(loss, transitions(), *both("actor_network", *members()))


def q_learning(loss: nn.Module) -> Case:
    return case(loss, transitions(discrete=True), *both("value_network"))


def distributional() -> Case:
    net = mlp(OBS, 3 * ACT).append(nn.Unflatten(-1, (3, ACT)))
    chooses = rl.DistributionalQValueActor(net, support=torch.arange(3.0), action_space="one-hot")
    return q_learning(objectives.DistributionalDQNLoss(chooses, gamma=0.9))


def expectile(kind: type[nn.Module], acts: nn.Module, q: nn.Module, *, discrete: bool, **options: Any) -> Case:
    loss = kind(acts, q, value(), **options)
    return case(loss, transitions(discrete=discrete), "actor_network", "value_network", *both(*members()))


def discrete_soft() -> Case:
    loss = objectives.DiscreteSACLoss(discrete_actor(), q_values(), action_space="one-hot", num_actions=ACT)
    return case(loss, transitions(discrete=True), "actor_network", *both(*members()))


def team_ppo(kind: type[nn.Module], *, centralized: bool) -> Case:
    reads: list[NestedKey] = [("agents", "observation")]
    critic = TensorDictModule(agents(1, share=centralized, centralized=centralized), reads, [("agents", "state_value")])
    loss = kind(gaussian(nn.Sequential(agents(2, share=not centralized)), reads, ("agents",)), critic)
    loss.set_keys(action=("agents", "action"), sample_log_prob=("agents", "action_log_prob"), value=critic.out_keys[0])
    return case(loss, team(), "actor_network", "critic_network")


def mixed() -> Case:
    gives = [("agents", name) for name in ("action", "action_value", "chosen_action_value")]
    net = TensorDictModule(agents(ACT, share=True), [("agents", "observation")], gives[1:2])
    pick = rl.QValueModule(action_value_key=gives[1], out_keys=gives, action_space="categorical")
    mixer = rl.QMixer(state_shape=(OBS,), mixing_embed_dim=4, n_agents=AGENTS, device="cpu")
    mix = TensorDictModule(mixer, [gives[2], "state"], ["chosen_action_value"])
    loss = objectives.QMixerLoss(rl.SafeSequential(net, pick), mix, action_space="categorical")
    batch = team()
    batch[gives[0]] = torch.arange(ROWS * AGENTS).reshape(ROWS, AGENTS) % ACT
    needs = dict.fromkeys(both("mixer_network"), gives[2])  # the local network gives it
    lacking = {"agents": {"chosen_action_value": draws()(ROWS, AGENTS, 1)}}
    return case(loss, batch, *both("local_value_network", "mixer_network"), needs=needs, lacking=lacking)


def transformer(kind: type[nn.Module]) -> Case:
    config = {"n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 4, "activation": "relu", "n_positions": 32}
    config |= {"resid_pdrop": 0.1, "attn_pdrop": 0.1}
    if kind is objectives.DTLoss:
        return case(
            kind(TensorDictModule(rl.DTActor(OBS, ACT, config), TRAJECTORY, ["action"])), sequences(), "actor_network"
        )
    body = TensorDictModule(rl.OnlineDTActor(OBS, ACT, config), TRAJECTORY, ["loc", "scale"])
    policy = rl.ProbabilisticActor(body, ["loc", "scale"], distribution_class=rl.TanhNormal)
    return case(kind(policy, target_entropy=-float(ACT)), sequences(), "actor_network")


def chunked() -> Case:
    net = ACTModel(OBS, ACT, TIME, 4, 2, num_encoder_layers=1, num_decoder_layers=1, latent_dim=2, dim_feedforward=4)
    body = TensorDictModule(net, ["observation", "action_chunk"], ["action_pred", "mu", "log_var"])
    chunk = draws()(ROWS, TIME, ACT)
    batch = transitions().update({"vla_action": {"chunk": chunk}})
    needs, lacking = {"actor_network": "action_chunk"}, {"action_chunk": chunk}  # the loss passes it under this name
    return case(objectives.ACTLoss(body), batch, "actor_network", needs=needs, lacking=lacking)


def diffusion() -> Case:
    net = rl.DiffusionActor(ACT, score_network=mlp(OBS + ACT + 1, ACT), num_steps=3, beta_start=0.2, beta_end=0.4)
    return case(objectives.DiffusionBCLoss(net), transitions(), "actor_network")


def adversarial() -> Case:
    net = TensorDictModule(normed(OBS + ACT, 1), ["observation", "action"], ["logit"])
    judge = TensorDictSequential(net, TensorDictModule(nn.Sigmoid(), ["logit"], ["d_logits"]))
    draw = draws()
    batch = transitions(collector_observation=draw(ROWS, OBS), collector_action=draw(ROWS, ACT))
    return case(objectives.GAILLoss(judge), batch, "discriminator_network")


def novelty() -> Case:
    inputs = dict.fromkeys(("predictor_network", "target_network"), ("next", "observation"))
    return case(objectives.RNDLoss(mlp(OBS, 2), mlp(OBS, 2)), transitions(), *inputs, inputs=inputs)


def no_network() -> Case:
    batch = TensorDict(observation={"mean": draws()(ROWS, OBS), "var": torch.eye(OBS).expand(ROWS, OBS, OBS)})
    return case(objectives.ExponentialQuadraticCost(), batch, error="ExponentialQuadraticCost holds no network")


def dreamer(part: str) -> Case:
    if part == "value":
        return case(objectives.DreamerValueLoss(latent_value()), sequences(), "value_model")
    model, env = world(1)
    if part == "model":
        return case(objectives.DreamerModelLoss(model), sequences(), "world_model")
    policy = gaussian(mlp(STATE + BELIEF, 2 * ACT), LATENT)
    loss = objectives.DreamerActorLoss(policy, latent_value(), env, imagination_horizon=2)
    return case(loss, sequences()[:, 0], "actor_model", "value_model")


def dreamer_v3(part: str) -> Case:
    (model, env), critic = world(3), latent_value()
    see = objectives.DreamerV3ModelLoss(model, reward_two_hot=False, detach_output=False)
    act = objectives.DreamerV3ActorLoss(
        gaussian(mlp(STATE + BELIEF, 2 * ACT), LATENT), critic, env, imagination_horizon=2
    )
    judge = objectives.DreamerV3ValueLoss(critic, actor_loss=act, slow_critic_regularization=1.0)
    if part == "model":
        return case(see, sequences(), "world_model")
    if part == "actor":
        return case(act, sequences()[:, 0], "actor_model", "value_model")
    if part == "value":
        return case(judge, sequences(), *both("value_model"))
    names = ["model_loss.world_model", "actor_loss.actor_model", "actor_loss.value_model"]
    names += [f"value_loss.{name}" for name in both("value_model")]
    updaters = (SoftUpdate(judge, tau=0.5),)
    return case(objectives.DreamerV3Loss(see, act, judge), sequences(), *names, updaters=updaters)


def composed() -> Case:
    model = rl.WorldModel(
        TensorDictModule(nn.Linear(OBS, STATE), ["observation"], ["latent"]),
        TensorDictModule(mlp(STATE + ACT, STATE), ["latent", "action"], ahead("latent")),
        TensorDictModule(nn.Linear(STATE, 1), ahead("latent"), ahead("reward")),
        decoder=TensorDictModule(nn.Linear(STATE, OBS), ["latent"], ["reconstructed_observation"]),
    )
    return case(objectives.WorldModelLoss(model, losses=["reward", "reconstruction"]), transitions(), "world_model")


def _table() -> dict[str, Callable[[], Case]]:
    o = objectives
    return {
        "A2CLoss": lambda: on_policy(o.A2CLoss),
        "A2CLoss, not functional": lambda: on_policy(o.A2CLoss, functional=False),
        "ACTLoss": chunked,
        "BCLoss": lambda: case(o.BCLoss(actor()), transitions(), "actor_network"),
        "CQLLoss": lambda: case(
            o.CQLLoss(actor(), q_value(), num_random=2), transitions(), "actor_network", *both(*members())
        ),
        "ClipPPOLoss": lambda: on_policy(o.ClipPPOLoss),
        "ClipPPOLoss, one trunk": shared_trunk,
        "CrossQLoss": lambda: soft(o.CrossQLoss, q_value(net=normed), targets=False),
        "DDPGLoss": lambda: case(
            o.DDPGLoss(deterministic_actor(), q_value(), delay_actor=True),
            transitions(),
            *both("actor_network", "value_network"),
        ),
        "DQNLoss": lambda: q_learning(o.DQNLoss(chooser(), action_space="one-hot")),
        "DTLoss": lambda: transformer(o.DTLoss),
        "DiffusionBCLoss": diffusion,
        "DiscreteCQLLoss": lambda: q_learning(o.DiscreteCQLLoss(chooser(), action_space="one-hot")),
        "DiscreteIQLLoss": lambda: expectile(
            o.DiscreteIQLLoss, discrete_actor(), q_values("state_action_value"), discrete=True, action_space="one-hot"
        ),
        "DiscreteSACLoss": discrete_soft,
        "DistributionalDQNLoss": distributional,
        "DreamerActorLoss": lambda: dreamer("actor"),
        "DreamerModelLoss": lambda: dreamer("model"),
        "DreamerV3ActorLoss": lambda: dreamer_v3("actor"),
        "DreamerV3Loss": lambda: dreamer_v3("all"),
        "DreamerV3ModelLoss": lambda: dreamer_v3("model"),
        "DreamerV3ValueLoss": lambda: dreamer_v3("value"),
        "DreamerValueLoss": lambda: dreamer("value"),
        "ExponentialQuadraticCost": no_network,
        "GAILLoss": adversarial,
        "IPPOLoss": lambda: team_ppo(o.IPPOLoss, centralized=False),
        "IQLLoss": lambda: expectile(o.IQLLoss, actor(), q_value(), discrete=False),
        "KLPENPPOLoss": lambda: on_policy(o.KLPENPPOLoss),
        "MAPPOLoss": lambda: team_ppo(o.MAPPOLoss, centralized=True),
        "OnlineDTLoss": lambda: transformer(o.OnlineDTLoss),
        "PPOLoss": lambda: on_policy(o.PPOLoss),
        "PPOLoss, not functional": lambda: on_policy(o.PPOLoss, functional=False),
        "QMixerLoss": mixed,
        "REDQLoss": lambda: soft(o.REDQLoss, q_value(), count=3),
        "RNDLoss": novelty,
        "ReinforceLoss": lambda: on_policy(o.ReinforceLoss),
        "ReinforceLoss, not functional": lambda: on_policy(o.ReinforceLoss, functional=False),
        "SACLoss": lambda: soft(o.SACLoss, q_value()),
        "SACLoss, with a value network": soft_with_value,
        "TD3BCLoss": lambda: twin_delayed(o.TD3BCLoss),
        "TD3Loss": lambda: twin_delayed(o.TD3Loss),
        "TD3Loss, critics in a list": lambda: twin_delayed(o.TD3Loss, [q_value(), q_value()]),
        "TQCLoss": lambda: soft(o.TQCLoss, q_value(4), top_quantiles_to_drop_per_net=1),
        "WorldModelLoss": composed,
    }


def _seeded(build: Callable[[], Case]) -> Case:
    torch.manual_seed(0)
    return build()


LOSSES: dict[str, Callable[[], Case]] = {name: partial(_seeded, build) for name, build in _table().items()}
