"""Environments whose returns can be written down, and policies for them."""

import random

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

OBS, LENGTH = 3, 4


class Paying(EnvBase):
    """Pays the action; what is observed is drawn at the start and stays. An episode is ``LENGTH`` steps."""

    opened: list["Paying"] = []  # noqa: RUF012 - those that nobody has closed

    def __init__(self, *batch_size):
        super().__init__(batch_size=torch.Size(batch_size))
        size, self._generator, self.taken = torch.Size(batch_size), torch.Generator(), 0
        self.observation_spec = Composite(observation=Unbounded((*size, OBS)), shape=size)
        self.action_spec = Bounded(-1e3, 1e3, (*size, 1))
        self.reward_spec = Unbounded((*size, 1))
        type(self).opened.append(self)

    def _set_seed(self, seed):
        self._generator.manual_seed(seed)

    def _reset(self, td=None, **_):
        self._now, self._drawn = 0, torch.randn(*self.batch_size, OBS, generator=self._generator)
        return TensorDict({"observation": self._drawn, "done": self._ended(False)}, self.batch_size)

    def _step(self, td):
        self._now, self.taken = self._now + 1, self.taken + 1
        done = self._ended(self._now == LENGTH)
        return TensorDict({"observation": self._drawn, "reward": self.pays(td), "done": done}, self.batch_size)

    def pays(self, td):
        return td["action"]

    def close(self, **_):
        self.opened.remove(self)

    def _ended(self, done):
        return torch.full((*self.batch_size, 1), done)


class Uneven(Paying):
    """Lane i ends after ``i + 1`` steps; a lane that has ended begins anew beside those that go on."""

    def _reset(self, td=None, **_):
        anew = torch.ones(*self.batch_size, 1, dtype=torch.bool)
        if td is not None and "_reset" in td:
            anew = td["_reset"]
        else:
            self._left = torch.zeros(*self.batch_size, 1)
            self._drawn = torch.zeros(*self.batch_size, OBS)
        drawn = torch.randn(*self.batch_size, OBS, generator=self._generator)
        self._drawn = torch.where(anew, drawn, self._drawn)
        self._left = torch.where(anew, torch.arange(1.0, len(self._left) + 1)[:, None], self._left)
        return TensorDict({"observation": self._drawn, "done": torch.zeros_like(anew)}, self.batch_size)

    def _step(self, td):
        self._left = self._left - 1
        values = {"observation": self._drawn, "reward": self.pays(td), "done": self._left == 0}
        return TensorDict(values, self.batch_size)


class Noisy(Paying):
    """Draws from every global random state there is, as an environment of somebody else's may."""

    def pays(self, td):
        return td["action"] + random.random() + float(np.random.rand()) + torch.rand(1)


class Team(EnvBase):
    """Two agents, each paid its action, for ``LENGTH`` steps."""

    def __init__(self):
        super().__init__()
        group = lambda **keys: Composite(agents=Composite(keys, shape=(2,)))  # noqa: E731
        self.observation_spec = group(observation=Unbounded((2, OBS)))
        self.action_spec = group(action=Bounded(-1e3, 1e3, (2, 1)))
        self.reward_spec = group(reward=Unbounded((2, 1)))
        self._generator = torch.Generator()

    def _set_seed(self, seed):
        self._generator.manual_seed(seed)

    def _reset(self, td=None, **_):
        self._now, self._drawn = 0, torch.randn(2, OBS, generator=self._generator)
        return self._told()

    def _step(self, td):
        self._now += 1
        return self._told().set(("agents", "reward"), td["agents", "action"])

    def _told(self):
        agents = TensorDict(observation=self._drawn, batch_size=[2])
        return TensorDict(agents=agents, done=torch.tensor([self._now == LENGTH]))


def linear_policy(hidden=3):
    """Two layers without bias, and nothing between: the action is ``w2 @ w1 @ observation``."""
    return nn.Sequential(nn.Linear(OBS, hidden, bias=False), nn.Linear(hidden, 1, bias=False))


def acting(net, observation="observation", action="action"):
    return TensorDictModule(net, [observation], [action])
