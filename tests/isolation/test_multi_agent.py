"""Networks of several agents, whose weights lie apart from their layers, and run under a vmap of their own."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close
from torchrl.modules import (
    MultiAgentMLP,
    NormalParamExtractor,
    ProbabilisticActor,
    QMixer,
    QValueModule,
    SafeSequential,
    TanhNormal,
)
from torchrl.objectives import ClipPPOLoss, SoftUpdate
from torchrl.objectives.multiagent import QMixerLoss

from tdhook_train import HookedModel
from tdhook_train.isolation import Shadow, networks


def agents(outputs, share, *, centralized=False):
    return MultiAgentMLP(
        n_agent_inputs=3,
        n_agent_outputs=outputs,
        n_agents=4,
        centralized=centralized,
        share_params=share,
        depth=1,
        num_cells=8,
    )


def ppo(share):
    keys = [("agents", "loc"), ("agents", "scale")]
    net = nn.Sequential(agents(4, share), NormalParamExtractor())
    policy = ProbabilisticActor(
        TensorDictModule(net, [("agents", "obs")], keys),
        in_keys={"loc": keys[0], "scale": keys[1]},
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    value = TensorDictModule(agents(1, share, centralized=True), [("agents", "obs")], [("agents", "state_value")])
    return ClipPPOLoss(policy, value)


def batch():
    return TensorDict({"agents": TensorDict({"obs": torch.randn(5, 4, 3)}, [5, 4])}, [5])


@pytest.mark.parametrize("share", [False, True], ids=["own weights", "shared weights"])
def test_a_shadow_follows_the_live_weights_and_can_be_read_and_set_inside(share):
    loss, td = ppo(share), batch()
    shadows = {name: Shadow(network) for name, network in networks(loss).items()}
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(torch.randn_like(parameter))
    live = {"actor_network": loss.actor_network, "critic_network": loss.critic_network}
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    for name, shadow in shadows.items():
        shadow.refresh()
        key = live[name].out_keys[0]
        with torch.no_grad():
            expected = live[name](td.clone())[key]
        hooked = HookedModel(shadow.module)
        hooked.trace(td)
        (first,) = [path for path in hooked.modules if path.endswith("_empty_net.0")]
        with hooked.run(td) as run:
            value = run.get(first)
        assert torch.equal(run.output[key], expected)
        with hooked.run(td) as run:
            run.set(first, value)
            run.set(first, lambda h: h * 1)
        assert torch.equal(run.output[key], expected)
        with hooked.run(td) as run:
            run.set(first, lambda h: h + 1)
        assert not torch.allclose(run.output[key], expected)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_values_of_agents_with_weights_of_their_own_are_those_of_each_agents_layer():
    loss, td = ppo(share=False), batch()
    shadow = Shadow(networks(loss)["actor_network"])
    with HookedModel(shadow.module).run(td) as run:
        value = run.get("**._empty_net.0")
    (found,) = value.resolve().values()
    params = loss.actor_network_params["module", "0", "module", "0", "params", "0"].data
    obs = td["agents", "obs"]
    for agent in range(4):
        assert_close(found[:, agent], obs[:, agent] @ params["weight"][agent].T + params["bias"][agent])


def test_a_mixer_and_its_target_are_networks_of_the_loss():
    chooser = SafeSequential(
        TensorDictModule(agents(2, share=True), [("agents", "obs")], [("agents", "action_value")]),
        QValueModule(
            action_value_key=("agents", "action_value"),
            out_keys=[("agents", "action"), ("agents", "action_value"), ("agents", "chosen_action_value")],
            action_space="categorical",
        ),
    )
    mixer = TensorDictModule(
        QMixer(state_shape=(4, 3), mixing_embed_dim=8, n_agents=4, device="cpu"),
        [("agents", "chosen_action_value"), ("agents", "obs")],
        ["chosen_action_value"],
    )
    loss = QMixerLoss(chooser, mixer, action_space="categorical", delay_value=True)
    SoftUpdate(loss, eps=0.5)
    found = networks(loss)
    assert set(found) == {
        "local_value_network",
        "mixer_network",
        "target_local_value_network",
        "target_mixer_network",
    }
    td = batch()
    out = Shadow(found["mixer_network"]).module(Shadow(found["local_value_network"]).module(td.clone()))
    expected = loss.mixer_network(loss.local_value_network(td.clone()))
    assert torch.equal(out["chosen_action_value"], expected["chosen_action_value"].detach())
