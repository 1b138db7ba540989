"""Layers of several agents are told apart by agent, whether the agents share weights or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses import LOSSES
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.testing import assert_close
from torchrl.modules import MultiAgentConvNet, MultiAgentMLP, NormalParamExtractor

from tdhook_train import At, HookedModel, Observer, ProbeSet
from tdhook_train.errors import PathError
from tdhook_train.health import DeadUnits
from tdhook_train.latent import ActivationPatching, RidgeProbe
from tdhook_train.rl import ObservedLoss

ROWS, AGENTS, OBS, UNITS = 12, 3, 4, 5
NET = "module.0._empty_net"


def policy(*, share: bool, centralized: bool = False) -> TensorDictModule:
    torch.manual_seed(0)
    net = MultiAgentMLP(
        OBS, 4, AGENTS, centralized=centralized, share_params=share, depth=1, num_cells=UNITS, activation_class=nn.Tanh
    )
    body = nn.Sequential(net, NormalParamExtractor())
    return TensorDictModule(body, [("agents", "obs")], [("agents", "loc"), ("agents", "scale")])


def batch() -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    obs = torch.randn(ROWS, AGENTS, OBS, generator=generator)
    return TensorDict({"agents": TensorDict({"obs": obs}, [ROWS, AGENTS])}, [ROWS])


def weights(net: TensorDictModule, layer: str, agent: int) -> tuple[Tensor, Tensor]:
    params = net.module[0].params
    one = params.data if params.batch_size == torch.Size([]) else params.data[agent]
    return one[layer, "weight"], one[layer, "bias"]


def hidden(net: TensorDictModule, td: TensorDict, agent: int) -> Tensor:
    weight, bias = weights(net, "0", agent)
    return td["agents", "obs"][:, agent] @ weight.T + bias


def hooked(net: nn.Module, td: TensorDict) -> HookedModel:
    model = HookedModel(net)
    model.trace(td)
    return model


@pytest.mark.parametrize("share", [False, True], ids=["own weights", "shared weights"])
def test_every_layer_stands_once_an_agent_in_the_order_of_the_agents(share):
    model = hooked(policy(share=share), batch())
    layers = [f"{NET}.{i}" for i in range(3)] + ["module.1.scale_mapping"]
    assert model.sites("**") == tuple(f"{layer}:agent {i}" for layer in layers for i in range(AGENTS))
    assert model.sites("**:agent 1") == tuple(f"{layer}:agent 1" for layer in layers)
    assert model.sites(f"{NET}.0") == tuple(f"{NET}.0:agent {i}" for i in range(AGENTS))
    assert model.sites(["module.1:1:agent 2", f"{NET}.0:agent 0"]) == (f"{NET}.0:agent 0", "module.1:1:agent 2")
    assert len(model.sites("module.1")) == 2 * AGENTS
    with pytest.raises(PathError, match=r"did you mean '.*_empty_net\.0:agent 2'"):
        model.sites(f"{NET}.0:agent 3")


def test_agents_whose_critic_they_share_are_not_told_apart_inside_it():
    model = hooked(policy(share=True, centralized=True), batch())
    assert model.sites(f"{NET}.**") == tuple(f"{NET}.{i}" for i in range(3))
    assert len(model.sites("module.1:0")) == AGENTS


def test_images_of_agents_are_told_apart_where_each_agent_has_a_network_of_its_own():
    torch.manual_seed(0)
    net = MultiAgentConvNet(
        2, centralized=False, share_params=False, in_features=1, num_cells=[2], kernel_sizes=2, strides=1
    )
    td = TensorDict(input=torch.randn(ROWS, 2, 1, 4, 4), batch_size=[ROWS])
    model = hooked(net, td)
    sites = model.sites(nn.Conv2d)
    assert sites == ("_empty_net.0:agent 0", "_empty_net.0:agent 1")
    with model.run(td) as run:
        value = run.get(sites[1])
    params = net.params.data[1]["0"]
    assert_close(value.resolve(), nn.functional.conv2d(td["input"][:, 1], params["weight"], params["bias"]))


@pytest.mark.parametrize("share", [False, True], ids=["own weights", "shared weights"])
def test_one_agents_values_can_be_read_set_and_differentiated(share):
    net, td = policy(share=share), batch()
    model = hooked(net, td)
    site = f"{NET}.0:agent 1"
    expected = net(td.clone())["agents", "loc"].detach()
    with model.run(td) as run:
        value, kept, gradient = run.get(site), run.get(site, detach=False), run.get_grad(site)
        run.backward(lambda out: out["agents", "loc"].sum())
    assert_close(value.resolve(), hidden(net, td, 1))
    assert_close(kept.resolve().detach(), hidden(net, td, 1))
    assert_close(run.output["agents", "loc"], expected)
    after, _ = weights(net, "2", 1)
    slope = 1 - hidden(net, td, 1).tanh().square()
    assert_close(gradient.resolve(), slope * after[:2].sum(0))
    for new in (torch.zeros(ROWS, UNITS), lambda h: h * 0):
        with model.run(td) as run:
            run.set(site, new)
        _, bias = weights(net, "2", 1)  # tanh(0) = 0: what is left is the last bias
        assert_close(run.output["agents", "loc"][:, 1], bias[:2].expand(ROWS, -1))
        others = [0, 2]
        assert torch.equal(run.output["agents", "loc"][:, others], expected[:, others])


@pytest.mark.parametrize("share", [False, True], ids=["own weights", "shared weights"])
def test_one_agents_gradient_can_be_bent(share):
    net, td = policy(share=share), batch()
    model = hooked(net, td)
    with model.run(td) as run:
        run.set_grad(f"{NET}.0:agent 1", lambda g: g * 0)
        through = run.get_input_grad(":agents:obs")
        run.backward(lambda out: out["agents", "loc"].sum())
    assert not through.resolve()[:, 1].any()
    assert through.resolve()[:, 0].all()


def test_an_agent_that_is_not_there_is_refused():
    net, td = policy(share=True), batch()
    model = hooked(net, td)
    with pytest.raises(PathError, match=r"'module\.0\._empty_net\.0:agent 3' names no agent"), model.run(td) as run:
        run.get(f"{NET}.0:agent 3")
    alone = nn.Linear(OBS, UNITS)  # has no agents, but more units than that
    rows = TensorDict(input=td["agents", "obs"][:, 0], batch_size=[ROWS])
    with pytest.raises(PathError, match=r"':agent 1' names no agent"), hooked(alone, rows).run(rows) as run:
        run.get(":agent 1")


@pytest.mark.parametrize("share", [False, True], ids=["own weights", "shared weights"])
def test_methods_measure_each_agent_on_its_own(share, tmp_path):
    net, td = policy(share=share), batch()
    targets = {f"{i}": lambda out, i=i: out["agents", "loc"][:, i, 0] for i in range(AGENTS)}
    own = [hidden(net, td, i)[:, 0] for i in range(AGENTS)]
    methods = {
        "patching": ActivationPatching(layers=f"{NET}.2", targets=targets, pairs=6),
        "probe": RidgeProbe(
            layers=f"{NET}.0", target={str(i): lambda _, i=i: own[i] for i in range(AGENTS)}, alphas=(1e-8,)
        ),
        "dead": DeadUnits(layers=f"{NET}.1"),
    }
    with torch.no_grad():  # kills a unit of the second agent, or of every agent where they share it
        weights(net, "0", 1)[1][0] = 100.0
    own = [hidden(net, td, i)[:, 1] for i in range(AGENTS)]
    with Observer(methods, when=At(0), into=tmp_path, on=ProbeSet(td, groups="rows")) as observer:
        observer.step(net, step=0)
        rows = {name: observer.buffer[name].at(0).clone() for name in methods}
        assert observer.buffer["probe"].coords["layer"] == [f"{NET}.0:agent {i}" for i in range(AGENTS)]
    assert_close(rows["patching"]["normalised"], torch.eye(AGENTS))
    r2 = rows["probe"]["r2"]
    assert (r2.diagonal() > 0.999).all()
    assert (r2[~torch.eye(AGENTS, dtype=torch.bool)] < 0.9).all()
    first = 1 / UNITS
    assert_close(rows["dead"]["dead"], torch.tensor([first] * 3 if share else [0.0, first, 0.0]))


def layers(loss: nn.Module, td: TensorDict, into: Any, **options: Any) -> list[str]:
    with Observer({"dead": DeadUnits(**options)}, when=At(0), into=into) as observer:
        ObservedLoss(loss, observer)
        loss(td)
        return list(observer.buffer["dead"].coords["layer"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("IPPOLoss", {"actor_network": 3, "critic_network": 3}),
        ("MAPPOLoss", {"actor_network": 3, "critic_network": 0}),
        ("QMixerLoss", {"local_value_network": 3, "target_local_value_network": 3}),
    ],
)
def test_losses_of_several_agents_name_the_agents_of_each_layer(name, expected, tmp_path):
    case = LOSSES[name]()
    found = layers(case.loss, case.batch, tmp_path, layers="**._empty_net.*", networks=tuple(expected))
    for network, agents in expected.items():
        inner = [layer.rpartition("_empty_net.")[2] for layer in found if layer.startswith(f"{network}.")]
        numbers = [f":agent {i}" for i in range(agents)] or [""]
        assert inner == [f"{layer}{agent}" for layer in range(3) for agent in numbers]


def test_copies_of_one_agents_values_meet_the_others_as_they_are():
    net, td = policy(share=False), batch()
    model = hooked(net.module[0], plain := TensorDict(input=td["agents", "obs"], batch_size=[ROWS]))
    copies = torch.stack([hidden(net, td, 1), torch.zeros(ROWS, UNITS)])
    with model.run(plain) as run:
        run.set("_empty_net.0:agent 1", copies, copies=2)
        after = run.get("_empty_net.1")
    found = after.resolve()  # [agent, copy, row, unit]: behind two dimensions, the batch is not the first one
    for agent in (0, 2):
        assert_close(found[agent], hidden(net, td, agent).tanh().expand(2, ROWS, UNITS))
    assert_close(found[1], copies.tanh())
