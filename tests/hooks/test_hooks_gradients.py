"""Gradients of many targets, at inputs and places, bent on their way, as a backward pass written by hand has them."""

import pytest
import torch
from hooks_models import Mlp, Thrice, passed, rows
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close

from tdhook_train import HookedModel
from tdhook_train.errors import PathError, ResolveError, TargetError


def jacobian(model, x):
    """Every output of every row with respect to that row's input, ``[output, row, input]``."""
    return torch.func.vmap(torch.func.jacrev(model))(x).movedim(1, 0).detach()


class Tanh(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "targets",
    [
        [("output", 0), ("output", 1)],
        {"first": ("output", 0), "second": lambda out: out["output"][:, 1].sum()},
    ],
    ids=["list", "mapping"],
)
def test_many_targets_come_from_one_forward_pass(targets):
    model, x, ran = Tanh(), torch.randn(5, 3), []
    model[0].register_forward_hook(lambda *_: ran.append(None))
    with HookedModel(model).run(rows(x)) as run:
        inputs, hidden, every = run.get_input_grad(""), run.get_grad("1"), run.get_grad("1", call="all")
        total = run.get_grad("1", reduce=lambda g: g.sum())
        run.backward(targets)
    assert len(ran) == 1
    assert_close(inputs.resolve(), jacobian(model, x))
    weight = model[2].weight.detach()
    assert_close(hidden.resolve(), weight[:, None].expand(2, 5, 4))
    assert torch.equal(every.resolve()[0], hidden.resolve())
    assert_close(total.resolve(), 5 * weight.sum(1))
    assert all(p.grad is None for p in model.parameters())


def test_grad_of_the_training_is_not_touched():
    model, x = Tanh(), torch.randn(5, 3)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    objects = [p.grad for p in model.parameters()]
    with HookedModel(model).run(rows(x)) as run:
        run.get_grad("**")
        run.backward([("output", 0), "output"])
    for parameter, grad, value in zip(model.parameters(), objects, before, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, value)


def test_the_value_at_a_place_is_differentiated_and_the_rest_of_the_model_does_not_run():
    model, x, ran = Tanh(), torch.randn(5, 3), []
    model[2].register_forward_hook(lambda *_: ran.append(None))
    with HookedModel(model).run(rows(x)) as run:
        unit, other = (run.get("1", reduce=lambda h, i=i: h[:, i].sum()) for i in (2, 3))
        grad = run.get_input_grad("0")
        run.stop("1")
        run.backward([unit, other])
    assert not ran
    slope = 1 - torch.tanh(model[0](x)).square()
    expected = torch.stack([slope[:, i, None] * model[0].weight[i] for i in (2, 3)])
    assert_close(grad.resolve(), expected.detach())


class Two(nn.Module):
    def forward(self, x, *, scale):
        return (x * scale).square()


def test_gradients_at_arguments_by_place_by_name_and_by_key():
    x, scale = torch.randn(4, 3), torch.randn(4, 3)
    td = TensorDict({"x": x, "s": scale}, [4])
    hooked = HookedModel(Two(), in_keys={"s": "scale"} | {"x": "x"})
    assert [hooked.input_site(key) for key in ("x", "s")] == [":x", ":scale"]
    assert HookedModel(Two(), ["x", "s"]).input_site("s") == ":1"
    wrapped = HookedModel(TensorDictModule(lambda x, s: (x * s).square(), [("a", "x"), ("a", "s")], ["output"]))
    assert wrapped.input_site(("a", "x")) == ":a:x"
    for model, batch in ((hooked, td), (wrapped, TensorDict({"a": {"x": x, "s": scale}}, [4]))):
        with model.run(batch) as run:
            grads = [run.get_input_grad(model.input_site(key)) for key in model.in_keys]
            run.backward("output")
        expected = {":scale": 2 * x * x * scale, ":x": 2 * x * scale * scale}
        expected |= {":a:x": expected[":x"], ":a:s": expected[":scale"]}
        for key, grad in zip(model.in_keys, grads, strict=True):
            assert_close(grad.resolve(), expected[model.input_site(key)])
    assert not any(v.requires_grad for v in td.values())


def test_guided_backpropagation_by_bending_gradients():
    """At each ReLU only what is positive goes back (Springenberg et al. 2014, equation 5)."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(5, 3)
    with HookedModel(model).run(rows(x)) as run:
        run.set_grad(nn.ReLU, lambda g: g.clamp(min=0))
        guided = run.get_input_grad("")
        run.backward("output")
    a = model[0](x)
    b = model[2](a.relu())
    back = model[4].weight.expand(5, 8).clamp(min=0) * (b > 0)
    back = (back @ model[2].weight).clamp(min=0) * (a > 0)
    assert_close(guided.resolve(), (back @ model[0].weight).detach())


def test_a_gradient_at_an_argument_is_bent_as_well_and_may_be_worked_on_in_place():
    """Summands are handed one and the same gradient: changing it in place at one must not change the other's."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.left(x) + self.right(x)

    model, x = Sum(), torch.randn(4, 3)
    with HookedModel(model).run(rows(x)) as run:
        run.set_grad("left", lambda g: g.mul_(10))
        left, right, inputs = run.get_grad("left"), run.get_grad("right"), run.get_input_grad("right")
        run.set_input_grad("right", lambda g: g * 0)
        total = run.get_input_grad("")
        run.backward("output")
    assert torch.equal(left.resolve(), torch.full((4, 3), 10.0))
    assert torch.equal(right.resolve(), torch.ones(4, 3))
    assert_close(inputs.resolve(), model.right.weight.detach().sum(0).expand(4, 3))
    assert_close(total.resolve(), 10 * model.left.weight.detach().sum(0).expand(4, 3))


def test_a_module_that_hands_its_input_on_has_the_gradient_of_its_own_readers_alone():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.drop = nn.Linear(3, 3), nn.Dropout(0.5)

        def forward(self, x):
            h = self.stem(x)
            return 2 * self.drop(h) + 3 * h

    model, x = Skip().eval(), torch.randn(4, 3)
    with HookedModel(model).run(rows(x)) as run:
        stem, drop, entered = run.get_grad("stem"), run.get_grad("drop"), run.get_input_grad("drop")
        run.backward("output")
    assert torch.equal(drop.resolve(), torch.full((4, 3), 2.0))
    assert torch.equal(entered.resolve(), torch.full((4, 3), 2.0))
    assert torch.equal(stem.resolve(), torch.full((4, 3), 5.0))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_view_that_an_activation_in_place_writes_to_keeps_its_gradient(frozen):
    class Flat(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(4, 1))

    model, x = Flat().requires_grad_(not frozen), torch.randn(6, 1, 3)
    with HookedModel(model).run(rows(x)) as run:
        flat, conv = run.get_grad("1"), run.get_grad("0")
        run.backward("output")
    before = model[0](x).flatten(1)
    expected = (model[3].weight * (before > 0)).detach()
    assert_close(flat.resolve(), expected)
    assert_close(conv.resolve(), expected.view(6, 2, 2))


def test_a_module_that_gives_out_a_parameter():
    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.randn(3))

        def forward(self):
            return self.value

    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = Bias()

        def forward(self, x):
            return x * self.bias()

    model, x = Adds(), torch.randn(4, 3)
    with HookedModel(model).run(rows(x)) as run:
        grad = run.get_grad("bias")
        run.set_grad("bias", lambda g: g * 2)
        run.backward("output")
    assert_close(grad.resolve(), x.sum(0))
    assert not model.bias.value._backward_hooks
    assert model.bias.value.grad is None


def test_each_call_of_a_module_has_its_own_gradient_in_the_order_of_the_calls():
    model, x = Thrice().double(), torch.randn(4, 3).double()
    with HookedModel(model).run(rows(x)) as run:
        every, inputs = run.get_grad("cell", call="all"), run.get_input_grad("cell", call="all")
        run.backward("output")
    w = model.cell.weight.detach()
    last = torch.ones(4, 3).double()
    for i, expected in enumerate((last @ w @ w, last @ w, last)):
        assert_close(every.resolve()[i], expected)
        assert_close(inputs.resolve()[i], expected @ w)


@pytest.mark.parametrize(
    ("objective", "error", "text"),
    [
        ("outputs", TargetError, "backward\\(\\) of 'outputs', which is no output; did you mean 'output'"),
        (("output", 7), TargetError, r"backward\(\) of \('output', 7\): the output has shape \(4, 2\)"),
        ([], TargetError, "was given no target to differentiate"),
        (lambda out: 3.0, TargetError, "differentiates one number, got float"),
        ([lambda out: out["output"]], TargetError, r"one number, got shape \(4, 2\); sum it, or give a list"),
    ],
)
def test_what_cannot_be_differentiated_says_so(objective, error, text):
    with pytest.raises(error, match=text):
        passed(Mlp(), torch.randn(4, 3), lambda run: (run.get_grad("0"), run.backward(objective)))


def test_a_value_that_was_never_reached_or_has_no_gradient_says_so():

    with pytest.raises(ResolveError, match=r"output of 'cell', which backward\(\) differentiates, was never reached"):
        passed(Thrice(), torch.randn(4, 3), lambda run: run.backward(run.get("cell", call=5)))
    with pytest.raises(TargetError, match=r"the gradient of ':0' does not exist: the value is torch.int64"):
        passed(
            nn.Embedding(5, 3),
            torch.tensor([1, 2]),
            lambda run: (run.get_input_grad(":0"), run.backward("output")),
        )
    with pytest.raises(PathError, match="did you mean"):
        passed(Mlp(), torch.randn(4, 3), lambda run: (run.get_input_grad("0:5"), run.backward("output")))
