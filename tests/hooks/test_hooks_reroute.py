"""Modules whose gradients go back by a rule: what they give out stays, the rule says the rest, nothing is left."""

import pytest
import torch
from hooks_models import rows
from torch import nn
from torch.testing import assert_close

from tdhook_train import HookedModel
from tdhook_train.errors import NetworkError, TdhookTrainError


def negated(passed, gradient):
    """A rule that nothing else computes: a ReLU's gradient with its sign changed, everywhere."""
    assert passed.output.shape == gradient.shape
    return -gradient


def own(passed, gradient):
    """The module's own way back."""
    inputs = [value.clone().requires_grad_() for value in passed.inputs]
    with torch.enable_grad():
        return torch.autograd.grad(passed.again(*inputs), inputs, gradient)


def relus(model, rule):
    return {part: rule for part in model.modules() if isinstance(part, nn.ReLU)}


def outputs_of(model, x, rules):
    hooked = HookedModel(model)
    with torch.enable_grad(), hooked.bent(rules=rules):
        return hooked.forward(rows(x))["output"]


def grads(model, x, rules):
    """Gradients of every output, ``[output, row, ...]``, from one graph."""
    leaf = x.clone().requires_grad_()
    out = outputs_of(model, leaf, rules)
    return torch.stack([torch.autograd.grad(col.sum(), leaf, retain_graph=True)[0] for col in out.unbind(1)])


def mlp(*, inplace=False):
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace), nn.Linear(6, 6), nn.ReLU(inplace), nn.Linear(6, 2))


class Reused(nn.Module):
    """One activation, twice in a pass."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(3, 4), nn.Linear(4, 2), nn.ReLU()

    def forward(self, x):
        return self.act(self.b(self.act(self.a(x))))


class Dropped(nn.Module):
    """Goes on with what the activation changed in place, not with what it returned."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        self.act(h)
        return self.b(h)


class Gate(nn.Module):
    def forward(self, x, *, gate):
        return x * gate


class Gated(nn.Module):
    """Hands tensors on by name."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.gate, self.b = nn.Linear(3, 4), nn.ReLU(), Gate(), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return self.b(self.gate(self.act(input=h), gate=h))


MODELS = [mlp, lambda: mlp(inplace=True), Reused, Dropped, Gated]


@pytest.mark.parametrize("make", MODELS, ids=["mlp", "in place", "twice", "dropped", "by name"])
def test_values_stay_bit_for_bit_and_the_own_way_back_gives_the_own_gradient(make):
    model, x = make(), torch.randn(5, 3)
    rules = {part: own for part in model.modules() if isinstance(part, nn.ReLU | Gate)}
    assert torch.equal(outputs_of(model, x, rules), model(x))
    leaf = x.clone().requires_grad_()
    expected = [torch.autograd.grad(col.sum(), leaf, retain_graph=True)[0] for col in model(leaf * 1).unbind(1)]
    assert_close(grads(model, x, rules), torch.stack(expected))


@pytest.mark.parametrize("inplace", [False, True])
def test_the_rule_is_what_goes_back(inplace):
    model, x = mlp(inplace=inplace), torch.randn(5, 3)
    linear = model[4].weight @ model[2].weight @ model[0].weight  # two rules that only change the sign
    assert_close(grads(model, x, relus(model, negated)), linear.detach()[:, None].expand(2, 5, 3))


def test_a_module_called_twice_has_a_way_back_for_each_call():
    model, x, seen = Reused(), torch.randn(5, 3), []

    def kept(passed, gradient):
        seen.append(passed.output)
        return gradient

    found = grads(model, x, relus(model, kept))
    assert_close(found, (model.b.weight @ model.a.weight).detach()[:, None].expand(2, 5, 3))
    hidden = model.act(model.a(x)).detach()
    assert [value.shape[1] for value in seen] == [2, 4, 2, 4]
    assert_close(seen[1], hidden)


def test_several_inputs_of_a_module_each_have_their_own():
    def halved(passed, gradient):
        _x, gate = passed.inputs
        return [gradient * gate / 2, None]

    model, x = Gated(), torch.randn(5, 3)
    rules = {model.gate: halved, model.act: lambda _passed, gradient: gradient}
    h = model.a(x).detach()
    expected = torch.einsum("ok,rk,ki->ori", model.b.weight, h / 2, model.a.weight).detach()
    assert_close(grads(model, x, rules), expected)


def test_no_parameter_of_the_training_is_touched_and_none_of_a_ruled_module_is_reached():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    model(x).sum().backward()
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    out = outputs_of(model, x, {model[1]: lambda _passed, gradient: gradient})
    reached = torch.autograd.grad(out.sum(), list(model.parameters()), allow_unused=True)
    assert [grad is None for grad in reached] == [False, False, True, False, False]
    for parameter, (grad, value) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, value)


def everything(model):
    hooks = [len(d) for m in model.modules() for name, d in vars(m).items() if name.endswith("_hooks")]
    return hooks, [sorted(vars(module)) for module in model.modules()]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_nothing_is_left_whichever_way_the_block_is_left(error):
    model, x = mlp(), torch.randn(5, 3)
    hooked, before = HookedModel(model), everything(model)
    outputs_of(model, x, relus(model, negated))
    assert everything(model) == before
    with pytest.raises(error), hooked.bent(rules=relus(model, negated)):
        raise error
    assert everything(model) == before
    broken = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 2))
    before = everything(broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        outputs_of(broken, x, relus(broken, negated))
    assert everything(broken) == before
    plain = x.clone().requires_grad_()
    model(plain).sum().backward()
    weights = [model[i].weight for i in (4, 2, 0)]
    open_ = [(model[0](x) > 0).float(), (model[:3](x) > 0).float()]
    assert_close(plain.grad, ((weights[0].sum(0) * open_[1]) @ weights[1] * open_[0]) @ weights[2])


def test_a_forward_of_the_instances_own_is_put_back():
    model, x = mlp(), torch.randn(5, 3)
    model[1].forward = ours = lambda value: value.clamp(min=0) * 2
    expected = model(x)
    assert torch.equal(outputs_of(model, x, relus(model, negated)), expected)
    assert model[1].forward is ours


@pytest.mark.parametrize("side", ["output", "input"])
def test_what_is_read_on_either_side_of_a_ruled_module_is_in_the_graph(side):
    model, x = mlp(), torch.randn(5, 3)
    hooked = HookedModel(model)
    with hooked.bent(rules=relus(model, negated)), hooked.run(rows(x)) as run:
        proxy = run.get_grad("3") if side == "output" else run.get_input_grad("3")
        run.backward("output")
    sign = 1 if side == "output" else -1
    assert_close(proxy.resolve(), sign * model[4].weight.sum(0).detach().expand(5, 6))


@pytest.mark.parametrize(("side", "sign"), [("output", 1), ("input", -1)])
def test_values_set_on_either_side_of_a_ruled_module_are_in_the_graph(side, sign):
    model, x = mlp(), torch.randn(5, 3)
    hooked, leaf = HookedModel(model), torch.randn(5, 6, requires_grad=True)
    with hooked.bent({"3": leaf}, side=side, rules=relus(model, negated)):
        out = hooked.forward(rows(x))["output"]
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert_close(grad, sign * model[4].weight.sum(0).detach().expand(5, 6))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Sum(nn.Module):
    def forward(self, parts):
        return parts[0] + parts[1]


class Twofold(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.sum, self.head = Pair(), Sum(), nn.Linear(3, 2)

    def forward(self, x):
        return self.sum(self.pair(self.head(x)))


def test_tensors_inside_something_are_refused():
    model, x = Twofold(), torch.randn(5, 3)
    with pytest.raises(NetworkError, match="Pair gives out 2 tensors in a tuple; a rule goes by tensors") as caught:
        outputs_of(model, x, {model.pair: negated})
    assert isinstance(caught.value, TdhookTrainError)
    with pytest.raises(NetworkError, match=r"Sum takes tensors in a tuple \(0\)"):
        outputs_of(model, x, {model.sum: negated})


def test_a_rule_is_shown_what_an_in_place_module_was_given():
    model, x, seen = nn.Sequential(nn.Linear(3, 4), nn.ELU(inplace=True), nn.Linear(4, 2)), torch.randn(5, 3), []

    def shown(passed, gradient):
        seen.append(passed.inputs[0])
        return gradient

    grads(model, x, {model[1]: shown})
    assert_close(seen[0], model[0](x).detach())
