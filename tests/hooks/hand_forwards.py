"""Forward passes written out from the weights alone: what an intervention must come to. Nothing here uses a hook."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hooks_models import Mlp, Thrice
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn


@dataclass(frozen=True)
class Model:
    """A row of the table: a model, its forward pass by hand, and places in it (as :class:`At` writes them)."""

    make: Callable
    hand: Callable
    x: Callable
    edits: str  # places that are changed, one at a time
    pairs: str  # `one to other`: the value of the first is put at the second
    stops: str
    in_keys: object = ("input",)
    out_keys: tuple = ("output",)
    outputs: tuple = ("output",)  # keys whose sum the forward pass by hand returns


class At(dict):
    """Called at every named place of a pass; what it returns goes on.

    A place is written ``path`` or ``path:item`` for what a module gives out, ``>path`` for what goes into it, and
    ``path@1`` at its second call. The values by place are those that went on; ``before`` holds those that came.
    ``changes`` has a function of the value and of this object for each place where something is changed; what a change
    puts in ``added`` belongs to what is differentiated.
    """

    def __init__(self, changes=()):
        super().__init__()
        self.changes, self.before, self.added = dict(changes), {}, []

    def __call__(self, place, value):
        self.before[place] = value = own(value)
        if place in self.changes:
            value = own(self.changes[place](value, self))
        self[place] = value
        return value


def own(value):
    """A tensor of its own for each place: its gradient is that of this place, and not of whoever else has the value."""
    if value.is_floating_point() and not value.requires_grad:
        value = value.detach().requires_grad_()
    return value.clone()


def step(at, path, value, function):
    """One module, with a place before it and one after it."""
    return at(path, function(at(f">{path}", value)))


def linear(layer):
    return lambda x: x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def relu(x):
    return x * (x > 0)


def hand_mlp(m, x, at):
    h = at(">", x)
    for path, function in (
        ("0", linear(m[0])),
        ("1", torch.tanh),
        ("2", linear(m[2])),
        ("3", relu),
        ("4", linear(m[4])),
    ):
        h = step(at, path, h, function)
    return at("", h)


class ResidualCnn(nn.Module):
    """Activation in place after batch norm, and an addition in place to what the second convolution gave out."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 4 * 4, 2)
        with torch.no_grad():  # statistics and weights as after some training: not those of an identity
            self.norm.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
            self.norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.5, 0.1]))
            self.norm.weight.copy_(torch.tensor([1.2, -0.7, 0.4, 2.0]))
            self.norm.bias.copy_(torch.tensor([0.1, 0.2, 0.3, -0.4]))
        self.eval()

    def forward(self, x):
        h = self.act(self.norm(self.conv(x)))
        y = self.inner(h)
        y += h
        return self.head(y.flatten(1))


def convolution(layer):
    return lambda x: F.conv2d(x, layer.weight, layer.bias, padding=1)


def batch_norm(layer):
    """(x − mean) / sqrt(var + ε) · γ + β, channel by channel."""
    mean, var, gamma, beta = (
        t[:, None, None] for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return lambda x: (x - mean) / (var + layer.eps).sqrt() * gamma + beta


def hand_cnn(m, x, at):
    h = step(at, "conv", at(">", x), convolution(m.conv))
    h = step(at, "norm", h, batch_norm(m.norm))
    h = step(at, "act", h, relu)
    y = step(at, "inner", h, convolution(m.inner)) + h
    return at("", step(at, "head", y.reshape(len(y), -1), linear(m.head)))


class Recurrent(nn.Module):
    """Everything that the LSTM gives out has its part in the output."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.lstm = nn.LSTM(4, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        sequence, (hidden, cell) = self.lstm(self.embed(x))
        return self.head(sequence.mean(1) + hidden[-1] * cell[0])


def lstm_layer(lstm, i, xs):
    """c ← σ(f)·c + σ(i)·tanh(g), h ← σ(o)·tanh(c), step by step."""
    w_in, w_rec, b_in, b_rec = (
        getattr(lstm, f"{name}_l{i}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h = c = xs.new_zeros(len(xs), lstm.hidden_size)
    hs = []
    for t in range(xs.shape[1]):
        enter, forget, new, leave = (xs[:, t] @ w_in.T + b_in + h @ w_rec.T + b_rec).chunk(4, -1)
        c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
        h = leave.sigmoid() * c.tanh()
        hs.append(h)
    return torch.stack(hs, 1), h, c


def hand_lstm(m, x, at):
    xs = at(">lstm", step(at, "embed", at(">", x), linear(m.embed)))
    xs, h0, c0 = lstm_layer(m.lstm, 0, xs)
    xs, h1, c1 = lstm_layer(m.lstm, 1, xs)
    sequence, hidden = at("lstm:0", xs), at("lstm:1:0", torch.stack([h0, h1]))
    cell = at("lstm:1:1", torch.stack([c0, c1]))
    return at("", step(at, "head", sequence.mean(1) + hidden[-1] * cell[0], linear(m.head)))


def hand_thrice(m, x, at):
    h = at(">", x)
    for call in ("", "@1", "@2"):
        h = at(f"cell{call}", linear(m.cell)(at(f">cell{call}", h)))
    return at("", h)


class Tied(nn.Module):
    """A module under two names, and a second one that has its weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.act = nn.Tanh()
        self.again = self.first
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.again(self.act(self.first(x))))


def hand_tied(m, x, at):
    h = step(at, "first", at(">", x), linear(m.first))
    h = step(at, "act", h, torch.tanh)
    h = at("again@1", linear(m.first)(at(">again@1", h)))  # the second call of the one module, under either name
    return at("", step(at, "last", h, lambda v: v @ m.first.weight.T + m.last.bias))


class Join(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, hidden, obs):
        return self.inner(hidden), hidden[..., :3] * obs


def chain():
    return TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), [("agents", "obs")], [("agents", "hidden")]),
        TensorDictModule(nn.ReLU(inplace=True), [("agents", "hidden")], [("agents", "act")]),
        TensorDictModule(Join(), [("agents", "act"), ("agents", "obs")], [("out", "q"), ("out", "extra")]),
        TensorDictModule(nn.Linear(3, 2), [("out", "extra")], [("out", "v")]),
    )


def hand_chain(m, x, at):
    first, _, join, last = (part.module for part in m.module)
    x = at(">:agents:obs", x)
    x = at(">module.0:agents:obs", x)  # a module gives on the TensorDict that it was given, and adds to it
    h = step(at, "module.0.module", x, linear(first))
    h = at("module.0:agents:hidden", h)
    h = step(at, "module.1.module", at(">module.1:agents:hidden", h), relu)
    h = at(">module.2:agents:act", at("module.1:agents:act", h))
    h, x = at(">module.2.module", h), at(">module.2.module:1", x)
    q = step(at, "module.2.module.inner", h, linear(join.inner))
    q, extra = at("module.2.module:0", q), at("module.2.module:1", h[..., :3] * x)
    q, extra = at("module.2:out:q", q), at("module.2:out:extra", extra)
    v = step(at, "module.3.module", at(">module.3:out:extra", extra), linear(last))
    return at(":out:v", at("module.3:out:v", v)) + at(":out:q", q)


def features(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64)


SMALL = {
    "mlp": Model(Mlp, hand_mlp, features(3, 3), "0 1 2 3 4 > >0 >3 >4", "0 to 2, 1 to >4, 2 to 3, 1 to 3", "0 2 3"),
    "cnn": Model(
        ResidualCnn,
        hand_cnn,
        features(3, 2, 4, 4),
        "conv norm act inner head > >norm >act >inner >head",
        "conv to act, norm to inner, act to inner, >norm to >inner",
        "conv norm act inner",
    ),
    "lstm": Model(
        Recurrent,
        hand_lstm,
        features(3, 5, 3),
        "embed lstm:0 lstm:1:0 lstm:1:1 > >lstm >head",
        "embed to lstm:0, lstm:1:0 to lstm:1:1, >lstm to lstm:0",
        "embed lstm:1:1",
    ),
    "called three times": Model(
        Thrice,
        hand_thrice,
        features(3, 3),
        "cell cell@1 cell@2 cell@all >cell@1 >cell@all >",
        "cell to cell@2, cell@1 to cell@2, cell to >cell@2, >cell to cell@1",
        "cell cell@1 cell@2",
    ),
    "tied": Model(
        Tied,
        hand_tied,
        features(3, 3),
        "first act again@1 last > >again@1 >last",
        "first to act, first to again@1, >first to >last, again@1 to last",
        "first again@1",
    ),
    "tensordict": Model(
        chain,
        hand_chain,
        features(3, 3),
        "module.0.module module.0:agents:hidden module.1:agents:act module.2.module:0 module.2.module:1 "
        "module.2:out:extra module.3.module :out:q >:agents:obs >module.1:agents:hidden >module.2.module:1 "
        ">module.2:agents:act",
        "module.0:agents:hidden to module.1:agents:act, module.0.module to >module.2.module, "
        ">:agents:obs to module.2:out:extra",
        "module.0.module module.1.module module.2.module.inner",
        (("agents", "obs"),),
        (("out", "q"), ("out", "v")),
        (("out", "v"), ("out", "q")),
    ),
}
