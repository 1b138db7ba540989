"""Small networks whose forward pass the tests write out by hand."""

import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import HookedModel


def rows(x, key="input"):
    return TensorDict({key: x}, batch_size=[len(x)])


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


class Cnn(nn.Module):
    """Convolution, batch norm, an activation in place, flatten, linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(3 * 4 * 4, 2)
        with torch.no_grad():  # statistics as after some training: not those of an identity
            self.norm.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1]))
            self.norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.5]))

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x))).flatten(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.outer = nn.Linear(3, 2)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)) + x)


class Thrice(nn.Module):
    """One module that runs three times."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(3, 3)

    def forward(self, x):
        return self.cell(self.cell(self.cell(x)))


class Items(nn.Module):
    """A module that gives out a tuple with a mapping in its second place, and one that gives out a mapping."""

    def __init__(self):
        super().__init__()
        self.split = Split()
        self.named = Named()

    def forward(self, x):
        first, second = self.split(x)
        low = self.named(second)["low"]
        return first + low


class Split(nn.Module):
    def forward(self, x):
        return x * 2, x * 3


class Named(nn.Module):
    def forward(self, x):
        return {"low": x - 1, "high": x + 1}


class Unused(nn.Module):
    """One of its modules never runs."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


def passed(model, x, change):
    """Run a pass that ``change`` describes."""
    with HookedModel(model).run(rows(x)) as run:
        change(run)
    return run


def state(model):
    """Everything a pass could leave on a model."""
    return {
        "hooks": {
            name: [len(d) for attribute, d in sorted(vars(module).items()) if attribute.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()},
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
    }
