"""Over random small models and random passes, failing ones too: everything is found as it was, and nothing is kept."""

import gc
import tracemalloc
import weakref
from contextlib import contextmanager, suppress

import hypothesis.strategies as st
import pytest
import torch
from hooks_models import Mlp, Thrice, rows
from hypothesis import given, settings
from tensordict import TensorDict
from torch import nn

from tdhook_train import HookedModel
from tdhook_train.errors import ResolveError, TdhookTrainError

WIDTH = 3


class Trip(nn.Module):
    """Fails when it is told to."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x * 1


class Count(nn.Module):
    """Replaces a buffer, writes to another and makes a third."""

    def __init__(self):
        super().__init__()
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("written", torch.zeros(WIDTH))

    def forward(self, x):
        self.replaced = self.replaced + 1
        with torch.no_grad():
            self.written.add_(x.detach().sum(0))
        if "made" not in self._buffers:
            self.register_buffer("made", torch.ones(2))
        return x


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(self.inner(x))


LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.BatchNorm1d(WIDTH),
    "dropout": lambda: nn.Dropout(0.5),
    "relu": lambda: nn.ReLU(inplace=True),
    "count": Count,
    "residual": lambda: Residual(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))),
    "twice": lambda: Twice(nn.Linear(WIDTH, WIDTH)),
    "trip": lambda: Trip(ValueError("in the model")),
    "interrupt": lambda: Trip(KeyboardInterrupt()),
}
TAPS = ("get", "get_input", "get_grad", "get_input_grad", "set", "set_input", "set_grad", "set_input_grad", "stop")


def fails(value):
    raise ZeroDivisionError


CHANGES = {
    "scales": lambda value: value * 2,
    "in place": lambda value: value.mul_(2),
    "nothing": lambda value: None,
    "shape": lambda value: value[:1],
    "fails": fails,
}


@st.composite
def models(draw):
    """A random chain, with what a training leaves on a model: mixed modes, gradients, frozen weights, hooks."""
    names = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5))
    model = nn.Sequential(*[LAYERS[name]() for name in names])
    for module in model.modules():
        module.training = draw(st.booleans())
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.booleans()))
        parameter.grad = torch.randn_like(parameter) if draw(st.booleans()) else None
    for module in model.modules():
        if draw(st.booleans()):
            module.register_forward_hook(lambda *_: None)
            module.register_forward_pre_hook(lambda *_: None)
    return model


@st.composite
def passes(draw, model):
    """Random taps at random places, with whether anything is differentiated."""
    paths = [name for name, _ in model.named_modules()] + ["*", "**"]
    taps = [
        (draw(st.sampled_from(TAPS)), draw(st.sampled_from(paths)), draw(st.sampled_from(sorted(CHANGES))))
        for _ in range(draw(st.integers(0, 4)))
    ]
    return taps, draw(st.sampled_from([None, "output", ["output", ("output", 0)]]))


def everything(model):
    """Values, and which objects hold them."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return {
        "hooks": [
            [
                (name, list(hooks), [id(h) for h in hooks.values()])
                for name, hooks in vars(m).items()
                if "_hooks" in name
            ]
            for m in model.modules()
        ],
        "flags": [(m.training, sorted(vars(m)), list(m._buffers)) for m in model.modules()],
        "objects": [id(t) for t in tensors],
        "values": [t.tolist() for t in tensors],
        "requires_grad": [t.requires_grad for t in tensors],
        "rng": torch.get_rng_state().tolist(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def describe(run, taps, objective):
    for tap, path, change in taps:
        if tap == "stop":
            if "*" not in path:
                run.stop(path)
        elif tap.startswith("set"):
            getattr(run, tap)(path, CHANGES[change], call="all")
        else:
            getattr(run, tap)(path, detach=change != "nothing")
    if objective is not None:
        run.backward(objective)


@contextmanager
def refused_by_torch():
    """Let pass what the bare model does as well: two activations in place, one on the other, have no backward pass."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TdhookTrainError) or "modified by an inplace operation" not in str(error):
            raise


@settings(max_examples=300, deadline=None)
@given(st.data())
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_whatever_happens_in_a_pass(mode, data):
    model = data.draw(models())
    taps, objective = data.draw(passes(model))
    td = rows(torch.randn(4, WIDTH))
    hooked = HookedModel(model)
    with mode():
        before, batch = everything(model), td["input"].clone()
        expected = suppress(TdhookTrainError, ValueError, KeyboardInterrupt, ZeroDivisionError)
        with expected, refused_by_torch(), hooked.run(td) as run:
            describe(run, taps, objective)
        with suppress(ValueError, KeyboardInterrupt):
            hooked.trace(td)
        assert everything(model) == before
    assert torch.equal(td["input"], batch)
    assert list(td.keys()) == ["input"]
    assert not td["input"].requires_grad


@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_a_finished_pass_keeps_nothing_alive(ends):
    model, x = Mlp(), torch.randn(64, 3)
    hooked, td = HookedModel(model), TensorDict({"input": x}, [64])
    gc.disable()  # by counting references alone: what a cycle holds would wait for a collection
    try:
        with suppress(ZeroDivisionError), hooked.run(td) as run:
            value, grad = run.get("1"), run.get_grad("1")
            every, feeding = run.get("**"), run.get("0")
            run.set("2", feeding)
            run.set("3", fails if ends == "in an error" else lambda h: h)
            run.backward("output")
        hidden = [weakref.ref(one) for one in (*value.found, *grad.found)]
        watched = [weakref.ref(one) for one in (model, hooked, td, x, model[0].weight)]  # a graph would hold the weight
        del model, hooked, td, x
        assert [ref() for ref in watched] == [None] * 5  # the pass and its values are still at hand
        del run, value, grad, every, feeding
        assert [ref() for ref in hidden] == [None] * len(hidden)
    finally:
        gc.enable()


def test_a_pass_is_over_when_it_is_over():
    with HookedModel(Mlp()).run(rows(torch.randn(4, 3))) as run:
        pass
    with pytest.raises(ResolveError, match="this pass is over; describe another"):
        run.get("0")
    with pytest.raises(ResolveError, match="this pass is over"), run:
        pass


def test_a_thousand_passes_leave_memory_flat():
    model, td = Thrice(), rows(torch.randn(16, 3))
    hooked = HookedModel(model)

    def once():
        with hooked.run(td) as run:
            every, grads = run.get("**", call="all"), run.get_grad("cell", call="all")
            run.set("cell", lambda h: h + 1, call=1)
            run.backward("output")
        return every.resolve(), grads.resolve()

    def tensors():
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    def bytes_after(passes):
        for _ in range(passes):
            once()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    once()
    gc.collect()
    before = tensors()
    tracemalloc.start()
    try:
        grown = -bytes_after(100) + bytes_after(1000)
    finally:
        tracemalloc.stop()
    assert tensors() == before
    assert grown < 16_000  # bytes: the smallest Python object left by every pass would make 16,000
