"""Whatever happens in a run, the model and the batch are found as they were."""

import pytest
import torch
from hooks_models import Cnn, Mlp, Thrice, passed, rows, state
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_train import HookedModel
from tdhook_train.errors import SetterError
from tdhook_train.undo import Undo


class Trip(nn.Module):
    """Raises what it is told to, in the middle of a pass."""

    def __init__(self, error=None):
        super().__init__()
        self.first, self.last, self.error = nn.Linear(3, 4), nn.Linear(4, 2), error

    def forward(self, x):
        h = self.first(x)
        if self.error is not None:
            raise self.error
        return self.last(h)


def everything(run):
    run.get("first")
    run.get_input("last")
    run.get_grad("first")
    run.set("first", lambda h: h * 2)
    run.set_input("last", lambda h: h + 1)
    run.set_grad("last", lambda g: g * 0)
    run.backward(lambda out: out["output"].sum())


def prepared(model):
    """Put on the model what a training has there: mixed modes, gradients, somebody's hook, a frozen weight."""
    model.last.eval()
    model.last.weight.requires_grad_(False)
    model.first.weight.grad = torch.ones_like(model.first.weight)
    model.first.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("error", [None, RuntimeError("in the model"), KeyboardInterrupt(), SystemExit()])
def test_nothing_is_left_on_the_model(error):
    model = prepared(Trip(error))
    before, td = state(model), rows(torch.randn(4, 3))
    hooked = HookedModel(model)
    if error is None:
        with hooked.run(td) as run:
            everything(run)
    else:
        with pytest.raises(type(error)), hooked.run(td) as run:
            everything(run)
        with pytest.raises(type(error)):
            hooked.trace(td)
    assert state(model) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_runs_and_nothing_is_left_where_the_block_itself_fails(error):
    model, ran = prepared(Trip()), []
    model.first.register_forward_hook(lambda *_: ran.append(1))
    before = state(model)

    def fails(run):
        everything(run)
        raise error

    with pytest.raises(error):
        passed(model, torch.randn(4, 3), fails)
    assert state(model) == before
    assert not ran


def test_nothing_is_left_after_a_setting_that_was_refused_or_never_used():
    model = prepared(Trip())
    before = state(model)
    for setting in ({"value": torch.zeros(1)}, {"value": lambda h: h, "call": 1}):
        with pytest.raises(SetterError):
            passed(model, torch.randn(4, 3), lambda run, s=setting: (run.get("first"), run.set("last", **s)))
    assert state(model) == before


def test_somebodys_own_hooks_stay_and_fire():
    model, ran = Mlp(), []
    handle = model[0].register_forward_hook(lambda *_: ran.append("theirs"))
    with HookedModel(model).run(rows(torch.randn(4, 3))) as run:
        run.get("0")
        run.stop("0")
    assert ran == ["theirs"]
    assert list(model[0]._forward_hooks) == [handle.id]


def test_the_batch_keeps_its_keys_its_values_and_its_flags():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3), nn.ReLU(inplace=True))
    x = torch.randn(4, 3)
    td = TensorDict({"input": x, "agents": {"obs": torch.randn(4, 3)}}, [4])
    before = td.clone()
    hooked = HookedModel(model)
    hooked.trace(td)
    hooked(td)
    with hooked.run(td) as run:
        run.get_grad("0")
        run.set("1", torch.zeros(2, 4, 3), copies=2)
        run.backward(lambda out: out["output"].sum())
    assert set(td.keys(True, True)) == set(before.keys(True, True))
    assert td["input"] is x
    assert bool((td == before).all())
    assert not any(value.requires_grad for value in td.values(True, True))


def test_the_batch_of_a_tensordict_module_is_not_written_to_with_or_without_copies():
    model = TensorDictModule(nn.Linear(3, 2), [("agents", "obs")], [("agents", "q")])
    td = TensorDict({"agents": TensorDict({"obs": torch.randn(4, 3)}, [])}, [])
    hooked = HookedModel(model)
    hooked(td)
    with hooked.run(td) as run:
        run.set("module", torch.zeros(2, 4, 2), copies=2)
    assert run.output["agents", "q"].shape == (2, 4, 2)
    assert set(td.keys(True, True)) == {("agents", "obs")}


def test_a_pass_does_not_draw_random_numbers_or_move_statistics_of_a_model_in_evaluation():
    model = nn.Sequential(Cnn(), nn.Dropout(0.5)).eval()
    before, rng = state(model), torch.get_rng_state()
    hooked, td = HookedModel(model), rows(torch.randn(4, 2, 4, 4, generator=torch.Generator()))
    hooked.trace(td)
    with hooked.run(td) as run:
        run.get("0.conv")
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), rng)


def test_graphs_are_not_kept_alive():
    model, td = Thrice(), rows(torch.randn(4, 3))
    with HookedModel(model).run(td) as run:
        value, grad = run.get("cell", call="all"), run.get_grad("cell", call="all")
        run.backward(lambda out: out["output"].sum())
    assert not value.live
    assert not grad.live
    assert not any(t.requires_grad for t in [*value.resolve(), *grad.resolve(), *run.output.values()])


def test_the_undo_stack_goes_back_last_first_whatever_one_of_them_raises():
    class Thing:
        colour = "red"

    thing, order = Thing(), []
    thing.size = 1

    def fails():
        order.append("fails")
        raise RuntimeError("on the way back")

    undo = Undo()
    undo.set(thing, "size", 2)
    undo.set(thing, "colour", "blue")
    undo.callback(order.append, "first in")
    undo.callback(fails)
    undo.callback(order.append, "last in")
    assert (thing.size, thing.colour) == (2, "blue")
    with pytest.raises(RuntimeError, match="on the way back"):
        undo.close()
    assert order == ["last in", "fails", "first in"]
    assert vars(thing) == {"size": 1}
    assert thing.colour == "red"
