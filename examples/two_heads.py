"""A network with two heads, policy and value: what does each rest on? Both from one call, one pass forward.

The network is made as those that play chess: 112 planes of 8 × 8 in, residual blocks that weigh their channels (SE),
a policy over 1,858 moves and a value. Its weights are random: put in those of a trained one.

Run with: python examples/two_heads.py
"""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_train.attribution import IntegratedGradients

PLANES, MOVES, WIDTH = 112, 1858, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        one, two = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.body = nn.Sequential(one, nn.ReLU(), two)
        self.weigh = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, 4, 1), nn.ReLU(), nn.Conv2d(4, WIDTH, 1))

    def forward(self, x):
        change = self.body(x)
        return (x + change * self.weigh(change).sigmoid()).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(PLANES, WIDTH, 3, padding=1), nn.ReLU(), Block(), Block())
        self.policy = nn.Sequential(nn.Conv2d(WIDTH, 8, 1), nn.Flatten(), nn.Linear(512, MOVES))
        self.value = nn.Sequential(nn.Conv2d(WIDTH, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 1), nn.Tanh())

    def forward(self, planes):
        trunk = self.trunk(planes)
        return self.policy(trunk), self.value(trunk)


torch.manual_seed(0)
model = TensorDictModule(Net(), in_keys=["planes"], out_keys=["policy", "value"])
td = TensorDict(planes=(torch.rand(8, PLANES, 8, 8) < 0.1).float(), batch_size=[8])

targets = {"move 340": ("policy", 340), "value": ("value", 0)}
with IntegratedGradients(targets=targets, points=16).prepare(model) as explained:
    both = explained(td)["attr", "planes"]
print("shares of both:", list(both.shape))
for i, (name, target) in enumerate(targets.items()):
    with IntegratedGradients(targets=target, points=16).prepare(model) as explained:
        alone = explained(td)["attr", "planes"]
    print(f"{name}: plane {int(both[:, i].abs().sum((0, 2, 3)).argmax())} has most;", end=" ")
    print(f"asked for alone the shares differ by {(alone - both[:, i]).abs().max() / alone.abs().max():.0e} at most")
