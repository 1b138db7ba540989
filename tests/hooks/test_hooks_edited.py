"""Settings that stay as long as a block lasts, whoever calls the model."""

import pytest
import torch
from hooks_models import Mlp, Thrice, Unused, rows, state
from torch import nn
from torch.testing import assert_close

from tdhook_train import HookedModel
from tdhook_train.errors import PathError, SetterError


def test_every_call_is_changed_until_the_block_ends():
    model, x = Thrice(), torch.randn(4, 3)
    before, plain = state(model), model(x)
    hooked = HookedModel(model)
    with hooked.edited({"cell": lambda h: h + 1}):
        changed = model(x)
        with hooked.run(rows(x)) as run:
            first = run.get("cell")
        assert torch.equal(run.output["output"], changed)
    cell = model.cell
    assert_close(changed, cell(cell(cell(x) + 1) + 1) + 1)
    assert_close(first.resolve(), (cell(x) + 1).detach())
    assert torch.equal(model(x), plain)
    assert state(model) == before


def test_patterns_classes_and_tensors_are_welcome_and_gradients_pass():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    with HookedModel(model).edited({nn.Linear: lambda h: h * 2, "1": torch.ones(4, 4)}):
        out = model(x)
        (grad,) = torch.autograd.grad(out.sum(), model[2].bias)
    assert_close(out, 2 * model[2](torch.ones(4, 4)))
    assert torch.equal(grad, torch.full((2,), 8.0))


def test_a_compiled_model_is_changed_as_well_and_not_compiled_again():
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    model, x = torch.compile(nn.Sequential(nn.Linear(3, 3)), backend=backend), torch.randn(4, 3)
    plain = model(x)
    with HookedModel(model).edited({"0": lambda h: h * 0}):
        assert not model(x).any()
    assert torch.equal(model(x), plain)
    assert len(compiled) == 1


def test_an_edit_that_never_took_hold_is_loud_at_the_end():
    model, x = Unused(), torch.randn(4, 3)
    before = state(model)
    with (
        pytest.raises(SetterError, match="the output set at 'idle' was never used: its module never ran"),
        HookedModel(model).edited({"idle": lambda h: h}),
    ):
        model(x)
    with HookedModel(model).edited({"idle": lambda h: h}):
        pass  # nothing ran at all: nothing was ignored
    with pytest.raises(IndexError), HookedModel(model).edited({"idle": lambda h: h}):
        model(x)[9]
    assert state(model) == before


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda h: None, "setting the output of '0': the function returned None; return the new value"),
        (lambda h: (h.zero_(), None)[1], "changed it in place and returned None"),
        (torch.zeros(3), r"shape \(3,\) was given where the module has \(4, 4\)"),
    ],
)
def test_an_edit_that_does_not_fit_is_loud_in_the_call(edit, text):
    model = Mlp()
    before = state(model)
    with pytest.raises(SetterError, match=text), HookedModel(model).edited({"0": edit}):
        model(torch.randn(4, 3))
    assert state(model) == before


def test_a_path_is_checked_before_any_hook_is_placed():
    model = Mlp()
    before = state(model)
    with (
        pytest.raises(PathError, match="path '7' names no module"),
        HookedModel(model).edited({"0": lambda h: h, "7": lambda h: h}),
    ):
        pass
    assert state(model) == before
