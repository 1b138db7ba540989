"""Guided backpropagation and deconvolution: against a way back written by hand, layer by layer."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import Deconvolution, GuidedBackpropagation, Saliency
from tdhook_train.errors import NetworkError

KINDS = pytest.mark.parametrize("kind", [GuidedBackpropagation, Deconvolution])


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def by_hand(kind, model, x):
    """Every output's signal, from the last layer to the first: ``[row, target, feature]``."""
    given, value = [], x
    for layer in model:
        given.append(value)
        value = layer(value.clone())
    signal = torch.eye(value.shape[1]).expand(len(x), -1, -1)
    for layer, before in reversed(list(zip(model, given, strict=True))):
        if isinstance(layer, nn.Linear):
            signal = signal @ layer.weight
            continue
        signal = signal.clamp(min=0)
        if kind is GuidedBackpropagation:
            most = 6 if isinstance(layer, nn.ReLU6) else torch.inf
            signal = signal * ((before > 0) & (before < most))[:, None]
    return signal.detach()


@KINDS
@pytest.mark.parametrize(
    "activation", [nn.ReLU, lambda: nn.ReLU(inplace=True), nn.ReLU6], ids=["relu", "in place", "relu6"]
)
def test_the_way_back_by_hand(kind, activation):
    model, x = mlp(4, 12, 9, 3, activation=activation), 30 * torch.randn(6, 4)  # past what a ReLU6 lets through
    found = measured(kind(), model, td_of(input=x))["attr", "input"]
    assert_close(found, by_hand(kind, model, x))
    assert not torch.allclose(found, measured(Saliency(), model, td_of(input=x))["attr", "input"], atol=1e-2)


@KINDS
@pytest.mark.parametrize(("side", "start"), [("output", 2), ("input", 1)])
def test_by_a_layer_as_by_the_inputs_of_what_comes_after_it(kind, side, start):
    model, x = mlp(4, 12, 9, 3, activation=nn.ReLU), torch.randn(6, 4)
    found = measured(kind(layers=["1", "3"], side=side), model, td_of(input=x))
    assert_close(found["attr", "1"], by_hand(kind, model[start:], model[:start](x)))
    assert_close(found["attr", "3"], by_hand(kind, model[start + 2 :], model[: start + 2](x)))


class Twice(nn.Module):
    """One ReLU, twice in a pass."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.act = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2), nn.ReLU()

    def forward(self, x):
        return self.head(self.act(self.b(self.act(self.a(x)))))


@KINDS
def test_one_module_twice_as_two_modules(kind):
    model, x = Twice(), torch.randn(5, 3)
    line = nn.Sequential(model.a, nn.ReLU(), model.b, nn.ReLU(), model.head)
    assert_close(measured(kind(), model, td_of(input=x))["attr", "input"], by_hand(kind, line, x))


class Functional(nn.Module):
    def __init__(self, *, also):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.act = nn.ReLU() if also else nn.Identity()

    def forward(self, x):
        return self.act(self.b(torch.relu(self.a(x))))


@KINDS
def test_a_model_without_relu_is_told_what_it_has_and_one_called_as_a_function_is_found(kind):
    td = td_of(input=torch.randn(5, 3))
    with pytest.raises(NetworkError, match=f"{kind.__name__} goes by nn.ReLU; Sequential has 2 Linear, 1 Tanh"):
        measured(kind(), mlp(3, 4, 2), td)
    with pytest.raises(NetworkError, match="Functional has 2 Linear, 1 Identity"):
        measured(kind(), Functional(also=False), td)
    with pytest.raises(NetworkError, match="Functional also calls relu as a function"):
        measured(kind(), Functional(also=True), td)


def cnn(*, inplace=False):
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.ReLU(inplace), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2), nn.ReLU(inplace)),
        *(nn.Flatten(), nn.Linear(20, 6), nn.ReLU(inplace), nn.Linear(6, 3)),
    )


@pytest.mark.parametrize("make", [lambda: mlp(4, 16, 8, 3, activation=nn.ReLU), cnn], ids=["mlp", "cnn"])
def test_the_values_of_captum(make):
    captum = pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")
    model = make()
    x = torch.randn(5, 4) if isinstance(model[0], nn.Linear) else torch.randn(5, 2, 8, 8)
    for kind, peer in ((GuidedBackpropagation, captum.GuidedBackprop), (Deconvolution, captum.Deconvolution)):
        found = measured(kind(), model, td_of(input=x))["attr", "input"]
        for i in range(3):
            with pytest.warns(UserWarning, match="Setting backward hooks on ReLU"):
                expected = peer(model).attribute(x.clone().requires_grad_(), target=i)
            assert_close(found[:, i], expected.detach(), atol=1e-5, rtol=0)
