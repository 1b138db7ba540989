"""An environment for the models of these tests, for the methods that play."""

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase


class Answering(EnvBase):
    """Shows three numbers, is told two, and pays their sum; two lanes, two steps an episode."""

    def __init__(self):
        super().__init__(batch_size=torch.Size([2]))
        self.observation_spec = Composite(input=Unbounded((2, 3)), shape=(2,))
        self.action_spec = Composite(output=Bounded(-1e3, 1e3, (2, 2)), shape=(2,))
        self.reward_spec = Unbounded((2, 1))
        self._generator = torch.Generator()

    def _set_seed(self, seed):
        self._generator.manual_seed(seed)

    def _reset(self, td=None, **_):
        self._now = 0
        return self._shown()

    def _step(self, td):
        self._now += 1
        return self._shown().set("reward", td["output"].sum(-1, keepdim=True))

    def _shown(self):
        shown, done = torch.randn(2, 3, generator=self._generator), torch.full((2, 1), self._now == 2)
        return TensorDict(input=shown, done=done, batch_size=[2])
