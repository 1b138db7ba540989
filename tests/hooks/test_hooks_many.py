"""A pattern, a class or a predicate reads and sets many places in one pass."""

import pytest
import torch
from hooks_models import Cnn, Items, Mlp, Thrice, passed, rows
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.testing import assert_close

from tdhook_train import HookedModel
from tdhook_train.errors import PathError, ResolveError, SetterError


def test_every_leaf_in_the_order_of_the_run_as_one_at_a_time():
    model, x = Cnn().eval(), torch.randn(4, 2, 4, 4)
    hooked = HookedModel(model)
    with hooked.run(rows(x)) as run:
        every = run.get("**")
    values = every.resolve()
    assert tuple(values) == ("conv", "norm", "act", "head")
    with hooked.run(rows(x)) as run:
        alone = {path: run.get(path) for path in values}
    for path, value in values.items():
        assert torch.equal(value, alone[path].resolve())
    hooked.trace(rows(x))
    assert tuple(values) == hooked.sites("**")


class Backwards(nn.Module):
    """Runs its layers against the order of their registration, and one of them not at all."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])

    def forward(self, x):
        return self.layers[0](self.layers[2](x))


@pytest.mark.parametrize(
    "selector", ["layers.*", nn.Linear, lambda module: isinstance(module, nn.Linear)], ids=["pattern", "class", "call"]
)
def test_the_order_is_that_of_the_run_and_what_did_not_run_is_left_out(selector):
    model, x = Backwards(), torch.randn(4, 3)
    with HookedModel(model).run(rows(x)) as run:
        values, grads, inputs = run.get(selector), run.get_grad(selector), run.get_input(selector)
        run.backward("output")
    assert tuple(values.resolve()) == tuple(inputs.resolve()) == ("layers.2", "layers.0")
    assert_close(values.resolve()["layers.2"], model.layers[2](x).detach())
    assert_close(inputs.resolve()["layers.0"], model.layers[2](x).detach())
    assert_close(grads.resolve()["layers.0"], torch.ones(4, 3))
    assert_close(grads.resolve()["layers.2"], model.layers[0].weight.detach().sum(0).expand(4, 3))


def test_tuples_and_mappings_are_expanded_and_can_be_narrowed_to_an_item():
    x = torch.randn(4, 3)
    with HookedModel(Items()).run(rows(x)) as run:
        every, seconds = run.get("**"), run.get("*:1")
    assert tuple(every.resolve()) == ("split:0", "split:1", "named:low", "named:high")
    assert tuple(seconds.resolve()) == ("split:1",)


def test_the_batch_that_a_wrapper_gives_out_is_left_to_the_modules_inside():
    chain = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 3), ["input"], ["hidden"]), TensorDictModule(nn.Tanh(), ["hidden"], ["output"])
    )
    with HookedModel(chain).run(rows(torch.randn(4, 3))) as run:
        every, named = run.get("**.*"), run.get("module.*:hidden")
    assert tuple(every.resolve()) == ("module.0.module", "module.1.module")
    assert tuple(named.resolve()) == ("module.0:hidden", "module.1:hidden")


def test_calls_of_modules_that_run_several_times():
    model, x = Thrice(), torch.randn(4, 3)
    with HookedModel(model).run(rows(x)) as run:
        second, every, fourth = run.get("*", call=1), run.get("*", call="all"), run.get("*", call=3)
    assert_close(second.resolve()["cell"], model.cell(model.cell(x)).detach())
    assert len(every.resolve()["cell"]) == 3
    with pytest.raises(ResolveError, match=r"'\*': no module that it names gave out numbers in this pass"):
        fourth.resolve()


def test_nothing_is_resolved_before_the_pass():
    with HookedModel(Mlp()).run(rows(torch.randn(4, 3))) as run:
        values = run.get("**")
        with pytest.raises(ResolveError, match=r"'\*\*' has no values yet"):
            values.resolve()
    assert len(values.resolve()) == 5


def test_a_setting_holds_at_every_place_that_ran():
    model, x = Backwards(), torch.randn(4, 3)
    with HookedModel(model).run(rows(x)) as run:
        run.set(nn.Linear, lambda h: h + 1)
        run.set_input("layers.*", lambda h: h * 2)
    assert_close(run.output["output"], (model.layers[0]((model.layers[2](x * 2) + 1) * 2) + 1).detach())
    with pytest.raises(SetterError, match="set at ReLU was never used: none of the 2 modules it names did"):
        passed(Idle(), x, lambda run: run.set(nn.ReLU, lambda h: h))


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.ReLU())

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        ("lyers.*", r"'lyers.\*' names no module of Backwards; did you mean"),
        (nn.Conv2d, "Conv2d names no module of Backwards"),
    ],
)
def test_a_selector_that_names_nothing_raises_where_it_is_written(selector, text):
    run = HookedModel(Backwards()).run(rows(torch.randn(4, 3)))
    for tap in (run.get, run.get_grad, run.get_input, lambda s: run.set(s, lambda h: h)):
        with pytest.raises(PathError, match=text):
            tap(selector)
    with pytest.raises(PathError, match=r"names many modules; a pass stops at one"):
        run.stop("layers.*")
