"""What is kept of a value: a copy of the moment, reduced, moved or with its graph, and nothing besides."""

import pytest
import torch
from hooks_models import Mlp, Thrice, passed, rows
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tdhook_train import HookedModel
from tdhook_train.errors import SetterError


def test_values_go_to_a_dtype_and_a_device():
    model, x = Mlp(), torch.randn(4, 3)
    with HookedModel(model).run(rows(x)) as run:
        half, moved, plain = run.get("0", to=torch.float16), run.get("0", to="meta"), run.get("0", to="cpu")
        grad = run.get_grad("0", to=torch.float64)
        run.backward("output")
    expected = model[0](x).detach()
    assert torch.equal(half.resolve(), expected.half())
    assert moved.resolve().device.type == "meta"
    assert torch.equal(plain.resolve(), expected)
    assert grad.resolve().dtype == torch.float64


def test_values_are_reduced_as_they_are_captured():
    model, x = Mlp(), torch.randn(4, 3)
    with HookedModel(model).run(rows(x)) as run:
        mean = run.get("2", reduce=lambda h: h.mean(0))
        column = run.get("2", reduce=lambda h: h[:, 1])  # before the activation in place after it
        double = run.get("2", reduce=lambda h: h.mean(), to=torch.float64)
        grad = run.get_grad("2", reduce=lambda g: g.abs().sum())
        every = run.get("**", reduce=lambda h: h.new_tensor(h.numel()))
        run.backward("output")
    expected = model[2](model[1](model[0](x))).detach()
    assert_close(mean.resolve(), expected.mean(0))
    assert torch.equal(column.resolve(), expected[:, 1])
    assert column.resolve().untyped_storage().nbytes() == 4 * 4  # the column alone, not a view of the layer
    assert_close(double.resolve(), expected.mean().double())
    active = (expected > 0) * model[4].weight.detach().sum(0)
    assert_close(grad.resolve(), active.abs().sum())
    assert [int(v) for v in every.resolve().values()] == [16, 16, 16, 16, 8]


@pytest.mark.parametrize(
    ("reduce", "text"),
    [
        (lambda h: h.zero_(), "reducing the output of '0': the function changed the value in place"),
        (lambda h: float(h.sum()), "reducing the output of '0': expected a tensor from reduce, got float"),
    ],
)
def test_a_reduction_that_would_change_the_pass_or_keeps_no_tensor_is_refused(reduce, text):
    with pytest.raises(SetterError, match=text):
        passed(Mlp(), torch.randn(4, 3), lambda run: run.get("0", reduce=reduce))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_graph_is_kept_on_request(frozen):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).requires_grad_(not frozen)
    x = torch.randn(5, 3)
    with torch.no_grad(), HookedModel(model).run(rows(x)) as run:
        hidden, out = run.get("0", detach=False), run.get("", detach=False)
        plain, total = run.get("0"), run.get("2", detach=False, reduce=lambda h: h.sum())
    assert not plain.resolve().requires_grad
    assert not run.output["output"].requires_grad
    (grad,) = torch.autograd.grad(out.resolve().square().sum(), hidden.resolve(), retain_graph=True)
    h = (x @ model[0].weight.T + model[0].bias).detach().requires_grad_()
    expected = torch.autograd.grad(model[2](h.relu()).square().sum(), h)[0]
    assert_close(grad, expected)
    assert torch.equal(hidden.resolve(), h)
    assert torch.equal(plain.resolve(), h.detach())
    if not frozen:
        (weight,) = torch.autograd.grad(total.resolve(), model[2].weight)
        assert_close(weight, h.relu().sum(0).expand(2, 4).detach())
    assert all(p.grad is None for p in model.parameters())


def test_a_second_order_gradient():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), torch.randn(5, 3).double()
    with HookedModel(model).run(rows(x)) as run:
        first = run.get_grad("0", detach=False)
        run.backward("output")
    (second,) = torch.autograd.grad(first.resolve().square().sum(), model[0].weight)

    def penalty(weight):
        h = x @ weight.T + model[0].bias
        return ((1 - h.tanh().square()) * model[2].weight).square().sum()

    assert_close(second, torch.func.grad(penalty)(model[0].weight.detach()))


class Made(TorchDispatchMode):
    """Sums the bytes of every storage that operations give out, but for those there were."""

    def __init__(self, before):
        super().__init__()
        self.total, self.known = 0, [tensor.untyped_storage() for tensor in before]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        if not any(storage._cdata == one._cdata for one in self.known):
            self.known.append(storage)  # kept alive: no other may take its place
            self.total += 0 if torch._C._is_cow_tensor(torch.empty(0).set_(storage)) else storage.nbytes()


@pytest.mark.parametrize("mode", ["plain", "gradient"])
def test_one_copy_is_made_of_what_is_kept_and_none_of_what_is_reduced(mode):
    model, x = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]), torch.randn(32, 64)

    def made(change):
        with Made([x, *model.parameters()]) as counted, HookedModel(model).run(rows(x)) as run:
            change(run)
            if mode == "gradient":
                run.backward("output")
        return counted.total

    layers, bare = 6 * 32 * 64 * 4, made(lambda run: None)
    assert made(lambda run: run.get("**")) - bare == layers
    assert made(lambda run: run.get("**", to=torch.float64)) - bare == 2 * layers
    assert made(lambda run: run.get("**", reduce=lambda h: h.sum())) - bare == 6 * 4
    if mode == "plain":
        assert bare == layers  # neither the input nor a weight is copied


def test_an_input_that_the_model_writes_to_is_copied():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), -torch.ones(4, 3)
    for given in (x, x.clone().share_memory_(), torch.from_numpy(x.numpy().copy())):
        with HookedModel(model).run(rows(given)) as run:
            inside = run.get_input("1")
        assert not inside.resolve().any()
        assert torch.equal(given, -torch.ones(4, 3))
        assert torch.equal(run.output["input"], -torch.ones(4, 3))


def test_a_value_by_call_from_an_earlier_run_is_set_call_by_call():
    model, x, y = Thrice(), torch.randn(4, 3), torch.randn(4, 3)
    hooked = HookedModel(model)
    with hooked.run(rows(y)) as run:
        every, last = run.get("cell", call="all"), run.get("cell", call=2)
    with hooked.run(rows(x)) as run:
        run.set("cell", every, call="all")
        inputs = run.get_input("cell", call="all")
    assert torch.equal(run.output["output"], last.resolve())
    assert torch.equal(inputs.resolve()[2], every.resolve()[1])
