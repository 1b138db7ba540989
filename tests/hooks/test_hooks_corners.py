"""Models and uses off the beaten track, each of which once came out wrong."""

import pytest
import torch
from hooks_models import Thrice, passed, rows
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tdhook_train import HookedModel
from tdhook_train.errors import PathError, ResolveError, SetterError, TargetError


class Fills(nn.Module):
    """Writes into the mapping that it was called with."""

    def forward(self, batch):
        batch["h"] = batch["x"] * 2
        return batch


class Ignores(nn.Module):
    """Goes on with the mapping that it handed out, not with what came back."""

    def __init__(self, filler, make):
        super().__init__()
        self.filler, self.make = filler, make

    def forward(self, x):
        batch = self.make(x)
        self.filler(batch)
        return batch["h"]


@pytest.mark.parametrize(
    ("filler", "make"),
    [
        (Fills(), lambda x: {"x": x}),
        (TensorDictModule(nn.Linear(3, 3), ["x"], ["h"]), lambda x: TensorDict({"x": x}, [len(x)])),
    ],
    ids=["dict", "TensorDictModule"],
)
def test_a_module_that_fills_the_mapping_it_was_given_is_set_and_differentiated_there(filler, make):
    x = torch.randn(2, 3)
    with HookedModel(Ignores(filler, make)).run(rows(x)) as run:
        run.set("filler:h", torch.full((2, 3), 7.0))
        grad = run.get_grad("filler:h")
        run.backward("output")
    assert torch.equal(run.output["output"], torch.full((2, 3), 7.0))
    assert torch.equal(grad.resolve(), torch.ones(2, 3))


def test_the_batch_of_a_caller_is_filled_while_a_policy_is_edited():
    actor = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 3), ["x"], ["h"]), TensorDictModule(nn.Linear(3, 2), ["h"], ["action"])
    )
    td = TensorDict({"x": torch.randn(2, 3)}, [2])
    with HookedModel(actor).edited({"module.0:h": lambda h: h * 0}):
        actor(td)
    assert not td["h"].any()
    assert_close(td["action"], actor.module[1].module.bias.expand(2, 2))


class Checkpointed(nn.Module):
    def __init__(self, *, on):
        super().__init__()
        self.on, self.layer = on, nn.Linear(3, 3)

    def part(self, x):
        return torch.exp(self.layer(x))

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=False) if self.on else self.part(x)


def test_what_checkpointing_computes_again_is_changed_again_and_read_once():
    found = []
    x, weight = torch.randn(4, 3), nn.Linear(3, 3).state_dict()
    for on in (False, True):
        model = Checkpointed(on=on)
        model.layer.load_state_dict(weight)
        with HookedModel(model).run(rows(x)) as run:
            run.set("layer", lambda h: h * 3)
            grad, every = run.get_input_grad(""), run.get("layer", call="all")
            run.backward("output")
        found.append(grad.resolve())
        assert len(every.resolve()) == 1
    assert_close(found[1], found[0])


def test_calls_that_checkpointing_makes_again_cannot_be_told_apart():
    class Twice(Checkpointed):
        def part(self, x):
            return torch.exp(self.layer(self.layer(x)))

    with pytest.raises(SetterError, match=r"its module ran 2 times and runs again on the way back .* set call=\"all\""):
        passed(
            Twice(on=True),
            torch.randn(4, 3),
            lambda run: (run.set("layer", lambda h: h * 2), run.get_input_grad(""), run.backward("output")),
        )


def test_code_compiled_around_an_edited_model_is_changed_as_well():
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    step = torch.compile(lambda value: model(value).sum(), backend="eager")
    plain = step(x)
    with HookedModel(model).edited({"0": lambda h: h * 0 + 5}):
        assert step(x) == 10
    assert torch.equal(step(x), plain)


@pytest.mark.parametrize("graph", [False, True])
def test_the_memory_of_the_callers_tensor_stays_where_it_is(graph):
    obs = torch.zeros(2, 3)
    seen_by_numpy = obs.numpy()
    hooked = HookedModel(nn.Sequential(nn.Linear(3, 3)))
    with hooked.run(rows(obs)) as run:
        entered = run.get_input("", detach=not graph)
    out = hooked(rows(obs))
    obs.add_(1)
    assert seen_by_numpy.sum() == 6
    assert not entered.resolve().any()
    assert out["output"].requires_grad


def test_an_output_that_is_a_buffer_is_the_one_of_the_pass():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(2, 1))

        def forward(self, x):
            return self.total.add_(x)

    model = Adds()
    with HookedModel(model).run(rows(torch.ones(2, 1))) as run:
        value = run.get("")
    assert torch.equal(run.output["output"], torch.ones(2, 1))
    assert torch.equal(value.resolve(), torch.ones(2, 1))
    assert not model.total.any()


def test_a_backward_pass_of_the_training_that_waits_is_not_disturbed():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.randn(4, 3)
    waiting = model(x)
    with HookedModel(model).run(rows(x)) as run:
        kept = run.get("1", detach=False)
    waiting.sum().backward()
    kept.resolve().sum().backward()


def test_layers_whose_weight_is_computed_are_layers_and_their_weights_are_not():
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.ReLU())
    hooked = HookedModel(model)
    hooked.trace(rows(torch.randn(5, 3)))
    assert hooked.sites("**") == ("0", "1")
    with hooked.run(rows(torch.randn(5, 3))) as run:
        weight = run.get("0.parametrizations.weight.0")  # a path of its own all the same
    assert weight.resolve().shape == (4, 3)


def test_attention_is_a_layer_though_its_projection_never_runs():
    hooked = HookedModel(nn.MultiheadAttention(4, 2, batch_first=True), ["input", "input", "input"])
    hooked.trace(rows(torch.randn(2, 3, 4)))
    assert hooked.sites("**") == (":0", ":1")


class Levels(nn.Module):
    def forward(self, x):
        return {"1": x + 1, "0": x}


class Picks(nn.Module):
    def __init__(self):
        super().__init__()
        self.levels = Levels()

    def forward(self, x):
        return self.levels(x)["0"]


def test_a_digit_that_is_a_key_is_no_place():
    with HookedModel(Picks()).run(rows(torch.zeros(1, 1))) as run:
        one, every = run.get("levels:0"), run.get("*")
        run.set("levels:0", torch.full((1, 1), 9.0))
    assert not one.resolve().any()
    assert torch.equal(every.resolve()["levels:0"], one.resolve())
    assert run.output["output"].item() == 9


def test_arguments_are_those_of_the_signature():
    class Masked(nn.Module):
        def forward(self, x, mask, *more, scale=None):
            return x * mask if scale is None else x * scale

    class Outer(nn.Module):
        def __init__(self, call):
            super().__init__()
            self.inner, self.call = Masked(), call

        def forward(self, x):
            return self.call(self.inner, x)

    x = torch.ones(1, 2)
    with HookedModel(Outer(lambda inner, x: inner(mask=x * 5, x=x))).run(rows(x)) as run:
        first, second = run.get_input("inner"), run.get_input("inner:1")
    assert torch.equal(first.resolve(), x)
    assert torch.equal(second.resolve(), x * 5)
    hooked = HookedModel(Outer(lambda inner, x: inner(x, x, x * 7)))
    with pytest.raises(PathError, match="'inner:scale' names no tensor"), hooked.run(rows(x)) as run:
        run.get_input("inner:scale")


def test_a_gradient_that_cannot_be_says_why():
    class Dark(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    with HookedModel(Dark()).run(rows(torch.randn(2, 3))) as run:
        grad = run.get_grad("body")
        run.backward("output")
    with pytest.raises(ResolveError, match="gradient of 'body': gradients are off where its module runs"):
        grad.resolve()
    with pytest.raises(TargetError, match=r"differentiates a floating-point number, got torch.int64"):
        passed(Dark(), torch.randn(2, 3), lambda run: run.backward(lambda out: out["output"].argmax()))


def test_buffers_of_every_kind_are_put_back():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("adjacency", torch.eye(3).to_sparse())
            self.register_buffer("seen", torch.zeros(0))
            self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            self.seen.resize_(3).copy_(x[0])
            return self.norm(self.layer((self.adjacency @ x.T).T))

    model, x = Graph(), torch.randn(4, 3)
    mean = model.norm.running_mean.clone()
    with HookedModel(model).run(rows(x)) as run:
        value = run.get("layer")
    assert_close(value.resolve(), model.layer(x).detach())
    assert model.seen.shape == (0,)
    assert torch.equal(model.norm.running_mean, mean)
    assert torch.equal(model.adjacency.to_dense(), torch.eye(3))


def test_a_stop_that_is_never_reached_is_loud():
    with pytest.raises(SetterError, match=r"the pass did not stop at 'cell': its module ran 3 time\(s\), not call 7"):
        passed(Thrice(), torch.randn(2, 3), lambda run: run.stop("cell", call=7))


def test_a_kept_graph_survives_the_backward_pass_of_the_same_run():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    with HookedModel(model).run(rows(torch.randn(2, 3))) as run:
        kept = run.get("1", detach=False)
        run.get_grad("0")
        run.backward("output")
    torch.autograd.grad(kept.resolve().sum(), model[0].weight)


def test_values_by_call_go_to_the_call_that_is_set():
    hooked, x = HookedModel(Thrice()), torch.randn(2, 3)
    with hooked.run(rows(torch.randn(2, 3))) as run:
        every = run.get("cell", call="all")
    with hooked.run(rows(x)) as run:
        run.set("cell", every, call=2)
    assert torch.equal(run.output["output"], every.resolve()[2])


def test_a_negative_zero_stays_one_where_a_graph_begins():
    with HookedModel(nn.Sequential(nn.Identity())).run(rows(torch.tensor([[-0.0, 0.0, 1.0]]))) as run:
        kept = run.get("0", detach=False)
    assert torch.equal(kept.resolve().signbit(), torch.tensor([[True, False, False]]))


def test_a_parameter_captured_in_inference_mode_can_be_used_later():
    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = Bias()

        def forward(self, x):
            return x + self.bias()

    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.randn(3))

        def forward(self):
            return self.value

    with torch.inference_mode(), HookedModel(Gives()).run(rows(torch.randn(2, 3))) as run:
        value = run.get("bias")
    assert not value.resolve().is_inference()


def test_one_key_may_be_given_as_text():
    hooked = HookedModel(nn.Linear(3, 2), in_keys="obs", out_keys="q")
    assert hooked(rows(torch.randn(4, 3), "obs"))["q"].shape == (4, 2)


def test_a_module_that_is_held_by_one_that_it_holds():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model[1].owner = model
    with HookedModel(model).run(rows(torch.randn(2, 3))) as run:
        every = run.get(nn.Linear)
    assert tuple(every.resolve()) == ("0",)
