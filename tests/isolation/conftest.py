import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor, QValueActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, DQNLoss, SACLoss


def actor():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), NormalParamExtractor())
    module = TensorDictModule(net, ["observation"], ["loc", "scale"])
    return ProbabilisticActor(
        module, in_keys=["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True, spec=None
    )


def critic():
    return ValueOperator(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), in_keys=["observation"])


def chooser():
    return QValueActor(nn.Linear(3, 4), in_keys=["observation"], action_space="one-hot")


class Q(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], -1))


MAKE = {
    "ppo": lambda: ClipPPOLoss(actor(), critic()),
    "ppo, not functional": lambda: ClipPPOLoss(actor(), critic(), functional=False),
    "sac": lambda: SACLoss(
        actor(), ValueOperator(Q(), in_keys=["observation", "action"]), num_qvalue_nets=2, target_entropy=-2.0
    ),
    "dqn": lambda: DQNLoss(chooser(), action_space="one-hot"),
}


@pytest.fixture(params=MAKE)
def loss(request):
    torch.manual_seed(0)
    return MAKE[request.param]()


@pytest.fixture
def make():
    return MAKE


@pytest.fixture
def batch():
    return TensorDict({"observation": torch.randn(6, 3), "action": torch.rand(6, 2)}, [6])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
