"""A shadow gives what the live network would give, and the live network never notices."""

import threading

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.nn.utils import prune
from torchrl.modules import ActorValueOperator, ValueOperator
from torchrl.objectives import ClipPPOLoss

from tdhook_train.errors import NetworkError
from tdhook_train.isolation import Network, Shadow, ShadowView, isolated, networks, private_copy


def counted(module):
    calls = []
    for part in module.modules():
        part.register_forward_hook(lambda *_: calls.append(1))
    return calls


def _pruned(layer):
    return prune.random_unstructured(layer, "weight", amount=3)


@pytest.mark.parametrize("name", ["ppo", "ppo, not functional"])
def test_the_same_outputs_as_the_live_weights_bit_for_bit_after_updates(name, make, batch):
    loss = make[name]()
    view = isolated(loss)
    optimizer = torch.optim.Adam(loss.parameters(), 0.1)
    for _ in range(3):
        loss.actor_network(batch.clone())["loc"].square().sum().backward()
        loss.critic_network(batch.clone())["state_value"].square().sum().backward()
        optimizer.step()
        with view.open(seed=0):
            loc = view.modules["actor_network"](batch.clone())["loc"]
            value = view.modules["critic_network"](batch.clone())["state_value"]
        assert torch.equal(loc, loss.actor_network(batch.clone())["loc"])
        assert torch.equal(value, loss.critic_network(batch.clone())["state_value"])


def test_buffers_are_refreshed_as_well():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    shadow, x = Shadow(networks(model)[""]), torch.randn(6, 3)
    model(x + 5)
    shadow.refresh()
    assert torch.equal(shadow.module(x), model.eval()(x))


def test_a_trunk_that_actor_and_critic_share(make, batch):
    trunk = TensorDictModule(nn.Linear(3, 3), ["observation"], ["hidden"])
    head = make["ppo"]().actor_network.module[0].module
    actor = make["ppo"]().actor_network
    actor.module[0].in_keys, actor.module[0].module = ["hidden"], head
    both = ActorValueOperator(trunk, actor, ValueOperator(nn.Linear(3, 1), in_keys=["hidden"]))
    loss = ClipPPOLoss(both.get_policy_operator(), both.get_value_operator())
    view = isolated(loss)
    with torch.no_grad():
        trunk.module.weight.add_(1.0)
    with view.open(seed=0):
        value = view.modules["critic_network"](batch.clone())["state_value"]
    assert torch.equal(value, both.get_value_operator()(batch.clone())["state_value"])


def test_the_live_networks_are_never_run_hooked_or_edited(loss, batch):
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    live = {network.module for network in networks(loss).values()}
    calls = [counted(module) for module in live]
    flags = [p.requires_grad for p in loss.parameters()]
    view = isolated(loss)
    with view.open(seed=0):
        for module in view.modules.values():
            module(batch.clone())
            with torch.no_grad():
                for p in module.parameters():
                    p.zero_()
            module.register_forward_hook(lambda *_: None)
    assert not any(calls)
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
    assert [p.requires_grad for p in loss.parameters()] == flags
    assert all(len(part._forward_hooks) == 1 for module in live for part in module.modules())


def test_the_weights_of_a_shadow_are_its_own(loss):
    live = {p.data_ptr() for p in loss.parameters()} | {b.data_ptr() for b in loss.buffers()}
    for module in ShadowView(loss).modules.values():
        assert not any(p.requires_grad for p in module.parameters())
        assert not {p.data_ptr() for p in (*module.parameters(), *module.buffers())} & live


class Recorder:
    """Somebody's hook, bound to what cannot be copied."""

    def __init__(self):
        self.lock, self.calls = threading.Lock(), 0

    def __call__(self, *_):
        self.calls += 1


def test_hooks_on_the_live_module_are_not_copied():
    model, recorder = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), Recorder()
    for module in (model, model[0]):
        module.register_forward_hook(recorder.__call__)
        module.register_forward_pre_hook(recorder.__call__)
        module.register_full_backward_hook(recorder.__call__)
        module.register_full_backward_pre_hook(recorder.__call__)
    twin = private_copy(model)
    twin(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert recorder.calls == 0
    twin[0].register_forward_hook(lambda *_: None)
    assert (len(twin[0]._forward_hooks), len(model[0]._forward_hooks), len(twin[1]._forward_hooks)) == (1, 1, 0)
    model(torch.randn(2, 3))
    assert recorder.calls == 4  # the live hooks still fire


def test_a_copy_is_in_evaluation_frozen_and_not_compiled():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    model.compile()
    twin = private_copy(model)
    assert not any(part.training or part._compiled_call_impl for part in twin.modules())
    assert not any(p.requires_grad for p in twin.parameters())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_random_numbers_follow_from_the_seed_and_those_of_the_training_are_untouched(loss):
    before = torch.get_rng_state()
    view = isolated(loss)
    draws = []
    for seed in (0, 0, 1):
        with view.open(seed=seed):
            draws.append(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_policy_acts_by_its_mode(make, batch):
    view = isolated(make["ppo"]())
    with view.open(seed=0):
        one = view.modules["actor_network"](batch.clone())
    with view.open(seed=1):
        two = view.modules["actor_network"](batch.clone())
    assert torch.equal(one["action"], two["action"])
    assert torch.allclose(one["action"], one["loc"].tanh(), atol=1e-6)


def test_a_module_that_cannot_be_copied_is_refused():
    model = nn.Linear(3, 2)
    model.lock = threading.Lock()
    with pytest.raises(NetworkError, match="Linear cannot be copied for observation: cannot pickle"):
        Shadow(Network("", model, lambda: None))


@pytest.mark.parametrize("make", [nn.utils.spectral_norm, nn.utils.weight_norm, _pruned])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_a_hook_of_torchs_computes_follow_the_live_ones(make):
    model, x = nn.Sequential(make(nn.Linear(3, 3))).eval(), torch.randn(2, 3)
    model(x)
    shadow = Shadow(networks(model)[""])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.tensor([[1.0], [2.0], [3.0]]) if parameter.ndim == 2 else 2.0)
    shadow.refresh()
    assert torch.equal(shadow.module(x), model(x).detach())
