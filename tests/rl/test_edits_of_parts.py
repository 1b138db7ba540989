"""One agent, a channel of an image, the output of a memory: ablated live and in an environment, as by hand."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from losses import LOSSES
from small_envs import LENGTH, OBS, Paying, Team
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from test_ablated_return import measured, seeds
from test_policies_multi_agent import AGENTS, NET, batch, policy, weights
from test_policies_multi_agent import OBS as SEEN
from test_policies_recurrent import memory
from test_policies_recurrent import policy as remembering
from torch import nn
from torch.testing import assert_close
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import ConvNet, MultiAgentMLP

from tdhook_train import At, LiveEdit, Observer
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import Ablate
from tdhook_train.rl import AblatedReturn, ObservedLoss


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    Paying.opened.clear()


def editing(into: Any, edit: Ablate) -> Observer:
    return Observer({"rank": EffectiveRank()}, when=At(99), into=into, edits={"e": LiveEdit(edit, when=At(0))})


@pytest.mark.parametrize("shape", [(), (12,), (4, 5), (AGENTS, 4)], ids=str)
@pytest.mark.parametrize("share", [False, True], ids=["own weights", "shared weights"])
def test_one_agent_is_ablated_whatever_the_batch_is(share, shape, tmp_path):
    net, td = policy(share=share), batch()
    obs = torch.randn(*shape, AGENTS, SEEN)
    given = TensorDict({"agents": TensorDict({"obs": obs}, [*shape, AGENTS])}, shape)
    expected = net(given.clone())["agents", "loc"].detach()
    with editing(tmp_path, Ablate(f"{NET}.0:agent 1")) as observer:
        observer.step(net, td, step=0)
        found = net(given.clone())["agents", "loc"].detach()
    _, bias = weights(net, "2", 1)  # tanh(0) = 0: what is left is the last bias
    assert_close(found[..., 1, :], bias[:2].expand(*shape, 2))
    for other in (0, 2):
        assert torch.equal(found[..., other, :], expected[..., other, :])
    assert torch.equal(net(given.clone())["agents", "loc"], expected)


def test_a_loss_trains_with_one_agent_ablated(tmp_path):
    case = LOSSES["IPPOLoss"]()
    twin = copy.deepcopy(case.loss)
    (path, layer), *_ = [(p, m) for p, m in case.loss.actor_network.named_modules() if isinstance(m, nn.Linear)]

    def zeroed(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        first = torch.zeros(AGENTS, 1)
        first[1:] = 1
        return output * first

    with editing(tmp_path, Ablate(f"actor_network.{path}:agent 0")) as observer:
        ObservedLoss(case.loss, observer)
        torch.manual_seed(1)
        case.loss(case.batch.clone())  # the step at which the span begins
        torch.manual_seed(1)
        found = case.loss(case.batch.clone())
    torch.manual_seed(1)
    intact = twin(case.batch.clone())
    twin.actor_network.get_submodule(path).register_forward_hook(zeroed)
    torch.manual_seed(1)
    expected = twin(case.batch.clone())
    assert layer is case.loss.actor_network.get_submodule(path)
    for name in ("loss_objective", "loss_entropy"):
        assert_close(found[name], expected[name])
        assert not torch.allclose(found[name], intact[name])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("share", [False, True], ids=["own weights", "shared weights"])
def test_one_agent_is_ablated_in_every_member_of_an_ensemble_that_runs_under_vmap(share, layer):
    net = policy(share=share)
    one = TensorDict.from_module(net).data
    members = torch.stack([one.apply(torch.randn_like) for _ in range(AGENTS)])  # as many members as agents

    def given(weights: Any, td: Any) -> torch.Tensor:
        with weights.to_module(net, preserve_module_state=False):
            return net(td.clone())["agents", "loc"]

    together = torch.vmap(given, (0, None))
    intact = together(members, batch())
    with Ablate(f"{NET}.{layer}:agent 1").prepare(net):
        found = together(members, batch())
    for member, own in zip(found, members, strict=True):
        last = own["module", "0", "params"] if share else own["module", "0", "params"][1]
        assert_close(member[:, 1], last["2", "bias"][:2].expand(12, 2))
    others = [0, 2]
    assert torch.equal(found[:, :, others], intact[:, :, others])


class Crew(Team):
    """As the team, in several lanes."""

    def __init__(self, *lanes: int) -> None:
        EnvBase.__init__(self, batch_size=torch.Size(lanes))
        size = torch.Size(lanes)

        def group(**keys: Any) -> Composite:
            return Composite(agents=Composite(keys, shape=(*size, 2)), shape=size)

        self.observation_spec = group(observation=Unbounded((*size, 2, OBS)))
        self.action_spec = group(action=Bounded(-1e3, 1e3, (*size, 2, 1)))
        self.reward_spec = group(reward=Unbounded((*size, 2, 1)))
        self._generator = torch.Generator()

    def _reset(self, td=None, **_):
        self._now, self._drawn = 0, torch.randn(*self.batch_size, 2, OBS, generator=self._generator)
        return self._told()

    def _told(self):
        agents = TensorDict(observation=self._drawn, batch_size=[*self.batch_size, 2])
        done = torch.full((*self.batch_size, 1), self._now == LENGTH)
        return TensorDict({"agents": agents, "done": done}, self.batch_size)


@pytest.mark.parametrize("lanes", [(), (2,), (3,)], ids=["unbatched", "as many lanes as agents", "three lanes"])
@pytest.mark.parametrize("share", [False, True], ids=["own weights", "shared weights"])
def test_the_team_earns_what_is_left_without_a_layer_of_one_agent(share, lanes):
    net = MultiAgentMLP(OBS, 1, 2, centralized=False, share_params=share, depth=0)
    actor = TensorDictModule(net, [("agents", "observation")], [("agents", "action")])
    td = TensorDict(agents=TensorDict(observation=torch.randn(7, 2, OBS), batch_size=[7, 2]), batch_size=[7])
    count = 6
    out = measured(AblatedReturn(partial(Crew, *lanes), "**", episodes=count), actor, td)
    env = Crew(*lanes)
    starts = [(env.set_seed(seed), env.reset()["agents", "observation"])[1] for seed in seeds(-(-count // env.numel()))]
    seen = torch.stack(starts).reshape(-1, 2, OBS)[:count]
    each = LENGTH * net(seen).detach().double()[..., 0]
    assert_close(out["return_intact"], each.sum(1), rtol=1e-5, atol=1e-5)
    assert_close(out["return_ablated"], each.flip(1).T, rtol=1e-5, atol=1e-5)  # what is left is the other's


class Lookout(Paying):
    """As its parent, in one lane, looking at an image."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_spec = Composite(observation=Unbounded((2, 5, 5)))

    def _reset(self, td=None, **_):
        self._now, self._drawn = 0, torch.randn(2, 5, 5, generator=self._generator)
        return TensorDict(observation=self._drawn, done=self._ended(False))


def seeing() -> nn.Sequential:
    convolved = ConvNet(2, num_cells=[3], kernel_sizes=3, strides=1, activation_class=nn.Tanh)
    return nn.Sequential(convolved, nn.Linear(27, 1))


@pytest.mark.parametrize("layer", ["0.0", "0.1"])
def test_the_channels_of_an_image_are_ablated_in_an_environment_without_a_batch(layer):
    net = seeing()
    td = TensorDict(observation=torch.randn(7, 2, 5, 5), batch_size=[7])
    method = AblatedReturn(Lookout, f"module.{layer}", units="each", by="mean", episodes=2)
    out = measured(method, TensorDictModule(net, ["observation"], ["action"]), td)
    env = Lookout()
    seen = torch.stack([(env.set_seed(seed), env.reset()["observation"])[1] for seed in seeds(2)])
    parts, count = [*net[0], net[1]], 1 + int(layer[-1])
    stem, rest = nn.Sequential(*parts[:count]), nn.Sequential(*parts[count:])
    with torch.no_grad():
        maps, means = stem(seen), stem(td["observation"]).mean((0, 2, 3))
        for channel in range(3):
            one = maps.clone()
            one[:, channel] = means[channel]
            expected = LENGTH * rest(one).double()[:, 0]
            assert_close(out["unit_return_ablated"][0, channel], expected, rtol=1e-4, atol=1e-4)
    assert out["unit_return_ablated"].shape == (1, 3, 2)


@pytest.mark.parametrize("rows", [(), (6,)], ids=["no rows", "rows"])
def test_a_channel_is_ablated_live_with_rows_and_without(rows, tmp_path):
    net = seeing()
    images = torch.randn(*rows, 2, 5, 5)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[0][0].weight[1] = twin[0][0].bias[1] = 0
    with editing(tmp_path, Ablate(nn.Conv2d, units=1)) as observer:
        observer.step(net, TensorDict(input=torch.randn(4, 2, 5, 5), batch_size=[4]), step=0)
        found = net(images)
    assert_close(found, twin(images))
    assert not torch.allclose(found, net(images))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_what_a_memory_gives_out_is_ablated_live_and_its_state_is_not(kind, tmp_path):
    recurrent = memory(kind)
    acting = remembering(recurrent)
    td = TensorDict(observation=torch.randn(6, 4), is_init=torch.zeros(6, 1, dtype=torch.bool), batch_size=[6])
    td.update({key: torch.randn(6, 2, 5) for key in recurrent.in_keys[1:] if key != "is_init"})
    expected = acting(td.clone())
    with editing(tmp_path, Ablate(f"module.0.module.1.{kind}:0")) as observer:
        observer.step(acting, td, step=0)
        found = acting(td.clone())
    bias = acting.module[0].module[2].module.bias
    assert_close(found["logits"], bias.expand(6, 2))
    for key in recurrent.out_keys[1:]:
        assert torch.equal(found[key], expected[key])
