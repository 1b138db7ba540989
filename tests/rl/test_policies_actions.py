"""Policies of every kind of action, of nested keys and with exploration are measured as they decide, untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    CompositeDistribution,
    InteractionType,
    TensorDictModule,
    TensorDictSequential,
    set_composite_lp_aggregate,
    set_interaction_type,
)
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.testing import assert_close
from torchrl.data import Bounded, OneHot
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs import ExplorationType, GymEnv, InitTracker, TransformedEnv, VecNormV2, set_exploration_type
from torchrl.modules import (
    Actor,
    AdditiveGaussianModule,
    EGreedyModule,
    NormalParamExtractor,
    OneHotCategorical,
    OrnsteinUhlenbeckProcessModule,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import ClipPPOLoss

from tdhook_train import At, Every, Method, Observer, ProbeSet
from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.health import DeadUnits, EffectiveRank
from tdhook_train.keys import path_of
from tdhook_train.latent import ActivationPatching, RidgeProbe
from tdhook_train.rl import ObservedLoss

JOINT = ("sensors", "joint")
OBS = 3


@dataclass(frozen=True)
class Outputs(Method):
    """All that a network gives out."""

    writes: ClassVar = {"out": "batch *any"}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        found = seen.batch.select(*model.out_keys)
        flat = {".".join(path_of(key)): found[key] for key in found.keys(include_nested=True, leaves_only=True)}
        return TensorDict({("out", name): value.clone() for name, value in flat.items()})


def net(outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(OBS, 4), nn.Tanh(), nn.Linear(4, outputs))


def body(network: nn.Module, *gives: Any) -> TensorDictModule:
    return TensorDictModule(network, [JOINT], list(gives))


def normal() -> nn.Module:
    params = body(net(4).append(NormalParamExtractor()), "loc", "scale")
    spec = Bounded(-1, 1, (2,))
    return ProbabilisticActor(params, ["loc", "scale"], distribution_class=TanhNormal, spec=spec, return_log_prob=True)


def one_hot() -> nn.Module:
    return ProbabilisticActor(
        body(net(3), "logits"), ["logits"], distribution_class=OneHotCategorical, spec=OneHot(3), return_log_prob=True
    )


def categorical() -> nn.Module:
    spec = CategoricalSpec(3)
    return ProbabilisticActor(
        body(net(3), "logits"), ["logits"], distribution_class=Categorical, spec=spec, return_log_prob=True
    )


class Split(nn.Module):
    """Parameters of two distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(7)

    def forward(self, observation: Tensor) -> tuple[Tensor, ...]:
        loc, scale, logits = self.net(observation).split([2, 2, 3], -1)
        return loc, scale.exp(), logits


def composite() -> nn.Module:
    names = {name: ("action", name) for name in ("move", "tool")}
    return ProbabilisticActor(
        body(Split(), ("params", "move", "loc"), ("params", "move", "scale"), ("params", "tool", "logits")),
        in_keys=["params"],
        out_keys=list(names.values()),
        distribution_class=CompositeDistribution,
        distribution_kwargs={"distribution_map": {"move": TanhNormal, "tool": Categorical}, "name_map": names},
        return_log_prob=True,
    )


POLICIES: dict[str, Callable[[], nn.Module]] = {
    "bounded": normal,
    "one-hot": one_hot,
    "categorical": categorical,
    "composite": composite,
}
FIRST = {"bounded": ("loc", 0), "composite": ("params", "move", "loc", 0)}


@pytest.fixture(autouse=True)
def apart():
    """Log-probabilities of a composite distribution stay apart."""
    with set_composite_lp_aggregate(False):
        yield


def batch(*shape: int) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    done = torch.zeros(*shape, 1, dtype=torch.bool)
    done[..., ::2, :] = True
    observation = torch.randn(*shape, OBS, generator=generator)
    return TensorDict({"sensors": {"joint": observation}, "next": {"done": done}}, shape)


def acting(policy: nn.Module, td: TensorDictBase) -> TensorDictBase:
    """Ask a copy made by hand what the policy decides."""
    with torch.no_grad(), set_interaction_type(InteractionType.DETERMINISTIC):
        return copy.deepcopy(policy).eval()(td.clone()).reshape(-1)


def outputs(row: TensorDictBase, policy: nn.Module) -> dict[Any, Tensor]:
    return {key: row["out", ".".join(path_of(key))] for key in policy.out_keys}


def everything(name: str) -> dict[str, Any]:
    target = [FIRST.get(name, ("logits", 0))]
    return {
        "outputs": Outputs(),
        "probe": RidgeProbe(target=(*JOINT, 0)),
        "dead": DeadUnits(),
        "rank": EffectiveRank(),
        "saliency": Saliency(targets=target),
        "ig": IntegratedGradients(targets=target),
        "patching": ActivationPatching(targets=target),
    }


@pytest.mark.parametrize("shape", [(12,), (4, 6)], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_measured_as_it_decides(name, shape, tmp_path):
    policy, td = POLICIES[name](), batch(*shape)
    td = policy(td).exclude("action")  # what a collector leaves: parameters of then, of other weights
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    state, rng = copy.deepcopy(policy.state_dict()), torch.get_rng_state()
    with Observer(everything(name), when=At(0), into=tmp_path) as observer:
        observer.step(policy, td, step=0)
        rows = {row: observer.buffer[row].at(0).clone() for row in observer.buffer}
        assert rows["probe"]["reason"].tolist() == [[0]] * len(observer.buffer["probe"].coords["layer"])
    expected = acting(policy, td)
    for key, value in outputs(rows["outputs"], policy).items():
        assert_close(value, expected[key])
    inputs = td[JOINT].reshape(-1, OBS).clone().requires_grad_()
    network = next(part for part in policy.modules() if type(part) is nn.Sequential and isinstance(part[0], nn.Linear))
    given = network(inputs)
    first = given[0] if isinstance(given, tuple) else given
    (slope,) = torch.autograd.grad(first[:, 0].sum(), inputs)
    assert_close(rows["saliency"][("attr", *JOINT)][:, 0], slope)
    assert_close(rows["ig"]["delta"], torch.zeros_like(rows["ig"]["delta"]), atol=1e-3, rtol=0)
    assert all(torch.equal(value, state[key]) for key, value in policy.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def trained(name: str, into: Any = None) -> list[Tensor]:
    policy = POLICIES[name]()
    critic = ValueOperator(nn.Linear(OBS, 1), in_keys=[JOINT])
    loss = ClipPPOLoss(policy, critic)
    td = policy(batch(12)).detach().update({"advantage": torch.ones(12, 1), "value_target": torch.ones(12, 1)})
    if name == "composite":
        loss.set_keys(
            action=[("action", "move"), ("action", "tool")],
            sample_log_prob=[("action", "move_log_prob"), ("action", "tool_log_prob")],
        )
    optimizer = torch.optim.Adam(loss.parameters(), 0.01)
    observer = None
    if into is not None:
        methods = everything(name) | {"outputs": Outputs(networks="actor_network")}
        observer = Observer(methods, when=At(0) | Every(optim_steps=1), into=into)
        ObservedLoss(loss, observer, optimizer)
    for _ in range(3):
        losses = loss(td.clone())
        sum(losses[key] for key in ("loss_objective", "loss_critic", "loss_entropy")).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if observer is not None:
        assert [observer.buffer[row].steps.tolist() for row in observer.buffer] == [[0, 1, 2]] * len(methods)
        observer.close()
    return [*(value.detach().clone() for value in loss.state_dict().values()), torch.get_rng_state()]


@pytest.mark.parametrize("name", POLICIES)
def test_ppo_ends_in_the_same_bits_with_every_kind_of_action(name, tmp_path):
    bare, watched = trained(name), trained(name, tmp_path)
    assert len(bare) == len(watched)
    assert all(torch.equal(one, other) for one, other in zip(bare, watched, strict=True))


def greedy() -> nn.Module:
    choosing = QValueActor(net(3), in_keys=[JOINT], spec=OneHot(3))
    return TensorDictSequential(choosing, EGreedyModule(OneHot(3), eps_init=1.0, annealing_num_steps=10))


def noisy(kind: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        spec = Bounded(-1, 1, (2,))
        moving = Actor(net(2).append(nn.Tanh()), in_keys=[JOINT], spec=spec)
        return TensorDictSequential(moving, kind(spec=spec, annealing_num_steps=10, **options))

    return make


EXPLORING = {
    "epsilon greedy": greedy,
    "gaussian": noisy(AdditiveGaussianModule),
    "ornstein-uhlenbeck": noisy(OrnsteinUhlenbeckProcessModule),
}


@pytest.mark.parametrize("asked", [None, ExplorationType.RANDOM], ids=["left alone", "asked to explore"])
@pytest.mark.parametrize("name", EXPLORING)
def test_exploration_is_neither_used_nor_advanced(name, asked, tmp_path):
    policy, td = EXPLORING[name](), batch(12)
    td["is_init"] = td["next", "done"].roll(1, 0)
    decided = acting(policy[0], td)["action"]
    explored = copy.deepcopy(policy)(td.clone())["action"]
    assert not torch.equal(explored, decided)  # left alone it explores
    state, rng = copy.deepcopy(policy.state_dict()), torch.get_rng_state()
    methods = {"probe": RidgeProbe(target=(*JOINT, 0)), "saliency": Saliency(), "patching": ActivationPatching(pairs=4)}
    with Observer({"actions": Actions(), **methods}, when=At(0), into=tmp_path) as observer:
        with nullcontext() if asked is None else set_exploration_type(asked):
            observer.step(policy, td, step=0)
        assert_close(observer.buffer["actions"].at(0)["action"], decided)
    assert all(torch.equal(value, state[key]) for key, value in policy.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


@dataclass(frozen=True)
class Actions(Method):
    """What a policy does."""

    writes: ClassVar = {"action": "batch unit"}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return TensorDict({"action": seen.batch["action"].clone()})


class Normalised(nn.Module):
    """Learns from everything that passes through it, in evaluation as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(OBS))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, observation: Tensor) -> Tensor:
        self.count += 1
        self.mean += (observation.detach().reshape(-1, OBS).mean(0) - self.mean) / self.count
        return observation - self.mean


@pytest.mark.parametrize("door", ["module", "loss"])
def test_running_statistics_of_a_policy_are_read_and_never_updated(door, tmp_path):
    normaliser = Normalised()
    network = nn.Sequential(normaliser, *net(4), NormalParamExtractor())
    policy = ProbabilisticActor(
        body(network, "loc", "scale"), ["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True
    )
    model: nn.Module = policy
    if door == "loss":
        model = ClipPPOLoss(policy, ValueOperator(nn.Linear(OBS, 1), in_keys=[JOINT]))
    td, name = batch(12), "actor_network" if door == "loss" else None
    methods = {
        "outputs": Outputs(networks=name),
        "probe": RidgeProbe(target=(*JOINT, 0), networks=name),
        "ig": IntegratedGradients(targets=[("loc", 0)], networks=name),
        "patching": ActivationPatching(targets=[("loc", 0)], pairs=4, networks=name),
    }
    with Observer(methods, when=At(0, 1), into=tmp_path, on=ProbeSet(td)) as observer:
        for step in (0, 1):
            mean, count = normaliser.mean.clone(), normaliser.count.clone()
            expected = acting(policy, td)
            observer.step(model, step=step)
            assert torch.equal(normaliser.mean, mean)
            assert torch.equal(normaliser.count, count)
            row = observer.buffer["outputs"].at(step)
            row = row.get("actor_network", row)
            assert_close(outputs(row, policy)["loc"], expected["loc"])
            policy(td.clone())  # the training goes on


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return all(
        same(value, after[key]) if isinstance(value, dict) else torch.equal(value, after[key])
        for key, value in before.items()
    )


def test_normalisation_in_the_environment_does_not_learn_from_a_measurement(tmp_path):
    env = TransformedEnv(GymEnv("CartPole-v1"), VecNormV2(in_keys=["observation"]))
    env.append_transform(InitTracker())
    torch.manual_seed(0)
    logits = TensorDictModule(nn.Linear(4, 2), ["observation"], ["logits"])
    policy = ProbabilisticActor(logits, ["logits"], distribution_class=OneHotCategorical)
    td = env.rollout(20, policy, break_when_any_done=False)
    before = copy.deepcopy(env.transform.state_dict())
    assert before
    methods = {"rank": EffectiveRank(), "saliency": Saliency()}
    with Observer(methods, when=At(0), into=tmp_path) as observer:
        observer.step(policy, td, step=0)
        assert len(observer.buffer["rank"].steps) == 1
    assert same(before, env.transform.state_dict())
    env.rollout(2)
    assert not same(before, env.transform.state_dict())
