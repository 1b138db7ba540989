"""The networks of a loss, by the names the loss gives them, with the weights that are trained."""

import pytest
import torch
from torch import nn
from torchrl.objectives import SoftUpdate

from tdhook_train.errors import NetworkError
from tdhook_train.isolation import LiveView, Shadow, ShadowView, isolated, networks

NAMES = {
    "ppo": {"actor_network", "critic_network"},
    "ppo, not functional": {"actor_network", "critic_network"},
    "sac": {
        "actor_network",
        *(f"{prefix}qvalue_network.{i}" for prefix in ("", "target_") for i in range(2)),
    },
    "dqn": {"value_network", "target_value_network"},
}


def shaken(loss):
    """Move every parameter of a loss, targets included, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in {id(v): v for v in (*loss.parameters(), *loss.buffers())}.values():
            if value.is_floating_point() and value.ndim:
                value.add_(torch.randn(value.shape, generator=generator))
    return loss


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_named_as_the_loss_names_them(name, make):
    assert set(networks(make[name]())) == NAMES[name]


@pytest.mark.parametrize(
    ("name", "network", "params", "member"),
    [
        ("ppo", "actor_network", "actor_network_params", None),
        ("ppo", "critic_network", "critic_network_params", None),
        ("sac", "qvalue_network.0", "qvalue_network_params", 0),
        ("sac", "qvalue_network.1", "qvalue_network_params", 1),
        ("sac", "target_qvalue_network.1", "target_qvalue_network_params", 1),
        ("dqn", "value_network", "value_network_params", None),
        ("dqn", "target_value_network", "target_value_network_params", None),
    ],
)
def test_a_shadow_gives_what_the_losss_own_parameters_give(name, network, params, member, make, batch):
    loss = shaken(make[name]())
    shadow = Shadow(networks(loss)[network])
    shaken(loss)  # after the copy was made: its weights are stale until it is refreshed
    shadow.refresh()
    weights = getattr(loss, params).data
    weights = weights if member is None else weights[member]
    module = getattr(loss, network.split(".")[0].removeprefix("target_"))
    with torch.no_grad(), weights.to_module(module, preserve_module_state=False):
        expected = module(batch.clone())
    found = shadow.module(batch.clone())
    keys = set(module.out_keys) & {"loc", "scale", "state_action_value", "state_value", "action_value"}
    assert keys
    for key in keys:
        assert torch.equal(found[key], expected[key])


def test_members_and_targets_differ_from_one_another_and_from_the_users_module(make, batch):
    loss = shaken(make["sac"]())
    found = {}
    for name, network in networks(loss).items():
        if "qvalue" in name:
            shadow = Shadow(network)
            shadow.refresh()
            found[name] = shadow.module(batch.clone())["state_action_value"]
    found["stale"] = loss.qvalue_network(batch.clone())["state_action_value"].detach()
    for a in found:
        for b in found:
            assert a == b or not torch.allclose(found[a], found[b])


def test_a_target_follows_its_updater(make, batch):
    loss = make["sac"]()
    updater = SoftUpdate(loss, tau=0.5)
    shadow = Shadow(networks(loss)["target_qvalue_network.0"])
    shadow.refresh()
    before = shadow.module(batch.clone())["state_action_value"]
    with torch.no_grad():
        loss.qvalue_network_params.apply(lambda p: p.data.add_(1.0), filter_empty=True)
    updater.step()
    shadow.refresh()
    assert not torch.allclose(before, shadow.module(batch.clone())["state_action_value"])


def test_a_bare_module_is_one_network_without_a_name():
    model = nn.Linear(3, 2)
    found = networks(model)
    assert list(found) == [""]
    assert found[""].module is model
    assert found[""].weights()["weight"].data_ptr() == model.weight.data_ptr()


def test_a_loss_without_a_network_says_what_to_do():
    class Odd(nn.Module):
        def convert_to_functional(self):
            """As TorchRL's losses have it."""

    with pytest.raises(NetworkError, match="Odd holds no network to observe; observe the module it trains instead"):
        networks(Odd())


def test_a_loss_is_shadowed_and_any_other_module_is_guarded(make):
    assert isinstance(isolated(make["ppo"]()), ShadowView)
    assert isinstance(isolated(nn.Linear(3, 2)), LiveView)
    with pytest.raises(NetworkError, match="expected a torch module or a TorchRL loss to observe, got dict"):
        isolated({})


def test_weights_are_the_live_ones_and_part_of_no_graph(loss):
    found = {name: network.weights() for name, network in networks(loss).items()}
    with torch.no_grad():
        for value in (*loss.parameters(), *loss.buffers()):
            value.zero_()
    for weights in found.values():
        values = list(weights.values(True, True))
        assert values
        assert not any(value.any() or value.requires_grad for value in values)
