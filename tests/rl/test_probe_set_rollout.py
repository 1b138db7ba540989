"""Probe sets rolled out: what the policy visits, and nothing else has changed."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from small_envs import LENGTH, Noisy, Paying, Uneven, acting, linear_policy
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.envs import GymEnv
from torchrl.modules import EGreedyModule, QValueActor

from tdhook_train import ProbeSet
from tdhook_train.errors import SettingsError


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    Paying.opened.clear()


def test_whole_trajectories_of_the_policy_in_the_order_of_time():
    net = linear_policy()
    probe_set = ProbeSet.rollout(Paying, acting(net), frames=2 * LENGTH + 1, seed=5)
    env = Paying()
    env.set_seed(5)
    drawn = torch.stack([env.reset()["observation"] for _ in range(2)]).repeat_interleave(LENGTH, 0)
    assert torch.equal(probe_set.td["observation"], drawn)  # of the third trajectory there was one frame
    torch.testing.assert_close(probe_set.td["action"], net(drawn).detach())
    assert probe_set.groups.tolist() == [0] * LENGTH + [1] * LENGTH
    assert probe_set.ordered
    assert not probe_set.td["action"].requires_grad


def test_lanes_are_told_apart():
    probe_set = ProbeSet.rollout(partial(Uneven, 3), acting(linear_policy()), frames=12)
    assert probe_set.groups.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6]  # four steps a lane
    for group in probe_set.groups.unique():
        assert len(probe_set.td["observation"][probe_set.groups == group].unique(dim=0)) == 1


def test_equal_arguments_give_equal_states_and_no_random_state_is_moved():
    roll = partial(ProbeSet.rollout, Noisy, None, frames=8)
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    one, two, other = roll(seed=1), roll(seed=1), roll(seed=2)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert Paying.opened == []


def test_an_environment_of_ones_own_stays_open():
    env = Paying()
    assert len(ProbeSet.rollout(env, frames=4)) == LENGTH
    assert Paying.opened == [env]


@pytest.mark.parametrize("exploration", ["random", "deterministic"])
def test_the_policy_is_left_as_it_was_and_explores_if_it_is_to(exploration):
    env = GymEnv("CartPole-v1")
    net = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))
    greedy = EGreedyModule(env.action_spec, annealing_num_steps=10, eps_init=1.0)
    policy = TensorDictSequential(QValueActor(net, in_keys=["observation"], action_space="one-hot"), greedy)
    greedy.step(3)
    state = {key: value.clone() for key, value in policy.state_dict().items()}
    probe_set = ProbeSet.rollout(env, policy, frames=60, exploration=exploration)
    env.close()
    assert all(torch.equal(value, state[key]) for key, value in policy.state_dict().items())
    assert all(module.training for module in policy.modules())
    best = net.eval()(probe_set.td["observation"]).argmax(-1)
    assert (probe_set.td["action"].long().argmax(-1) == best).all().item() == (exploration == "deterministic")


def test_what_cannot_be_rolled_out_is_refused():
    with pytest.raises(SettingsError, match="at least 2 frames, got frames=1"):
        ProbeSet.rollout(Paying, frames=1)
    with pytest.raises(SettingsError, match=r"exploration='randm' is none of .* did you mean 'random'"):
        ProbeSet.rollout(Paying, exploration="randm")
    with pytest.raises(SettingsError, match="needs an environment or what makes one, got a dict"):
        ProbeSet.rollout(dict)
