"""Setting changes what comes after as the same change made by hand, and is never silently ignored."""

import pytest
import torch
from hooks_models import Items, Mlp, Named, Thrice, Unused, passed, rows
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.testing import assert_close

from tdhook_train import HookedModel
from tdhook_train.errors import PathError, SetterError


def tail(model, hidden):
    """The rest of the Mlp after its second module, by hand."""
    c = hidden @ model[2].weight.T + model[2].bias
    return (c.clamp_min(0) @ model[4].weight.T + model[4].bias).detach()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_set_by_tensor_function_proxy_of_this_pass_and_proxy_of_another(mode, backward):
    model, x, y = Mlp(), torch.randn(5, 3), torch.randn(5, 3)
    hooked, hidden = HookedModel(model), torch.randn(5, 4)

    def patched(change):
        with mode(), hooked.run(rows(x)) as run:
            change(run)
            if backward:
                run.backward(lambda out: out["output"].sum())
        return run.output["output"]

    with hooked.run(rows(y)) as run:
        other = run.get("1")
    here, there = torch.tanh(model[0](x)), torch.tanh(model[0](y))
    assert_close(patched(lambda run: run.set("1", hidden)), tail(model, hidden))
    assert_close(patched(lambda run: run.set("1", lambda h: h * 2)), tail(model, here * 2))
    assert_close(patched(lambda run: run.set("1", lambda h: h.mul_(2))), tail(model, here * 2))
    assert_close(patched(lambda run: run.set("1", other)), tail(model, there))
    assert_close(patched(lambda run: run.set("1", run.get("0"))), tail(model, model[0](x)))
    assert_close(patched(lambda run: run.set_input("2", hidden)), tail(model, hidden))


@pytest.mark.parametrize("backward", [False, True])
def test_a_value_of_the_same_pass_is_what_it_was_before_an_activation_in_place(backward):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)), torch.randn(5, 3)
    with HookedModel(model).run(rows(x)) as run:
        pre = run.get("0")
        run.set("2", pre)
        if backward:
            run.backward(lambda out: out["output"].sum())
    assert (pre.resolve() < 0).any()
    assert_close(run.output["output"], model[0](x).detach())


def test_gradients_flow_through_a_value_of_the_same_pass():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(5, 3)
    with HookedModel(model).run(rows(x)) as run:
        h, grad = run.get("0"), run.get_grad("0")
        run.set("2", h)
        run.backward(lambda out: out["output"].square().sum())
    assert_close(grad.resolve(), 2 * model[0](x).detach())


def test_what_is_set_is_not_written_to_by_an_activation_in_place():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    negative = -torch.ones(4, 3)
    with HookedModel(model).run(rows(torch.randn(4, 3))) as run:
        value = run.get("0")
        run.set("0", negative)
    with HookedModel(model).run(rows(torch.randn(4, 3))) as again:
        again.set("0", value)
    assert torch.equal(negative, -torch.ones(4, 3))
    assert (value.resolve() < 0).any()


def test_reads_and_settings_of_one_site_happen_as_written():
    model, x = Mlp(), torch.randn(5, 3)
    with HookedModel(model).run(rows(x)) as run:
        before = run.get("1")
        run.set("1", lambda h: h + 1)
        between = run.get("1")
        run.set("1", lambda h: h * 2)
        after = run.get("1")
    h = torch.tanh(model[0](x)).detach()
    assert_close(before.resolve(), h)
    assert_close(between.resolve(), h + 1)
    assert_close(after.resolve(), (h + 1) * 2)


def test_items_of_tuples_mappings_and_tensordicts_are_set_alone():
    x, new = torch.randn(4, 3), torch.randn(4, 3)
    with HookedModel(Items()).run(rows(x)) as run:
        run.set("split:1", new)
        untouched = run.get("split:0")
    assert_close(run.output["output"], x * 2 + new - 1)
    assert torch.equal(untouched.resolve(), x * 2)
    with HookedModel(Items()).run(rows(x)) as run:
        run.set("named:low", new)
    assert_close(run.output["output"], x * 2 + new)
    chain = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 3), ["input"], ["hidden"]), TensorDictModule(nn.Tanh(), ["hidden"], ["output"])
    )
    with HookedModel(chain).run(rows(x)) as run:
        run.set("module.0:hidden", new)
    assert_close(run.output["output"], new.tanh())
    assert run.output.batch_size == (4,)


def test_what_the_module_gave_out_is_not_written_to():
    class Keeps(Named):
        def forward(self, x):
            self.given = super().forward(x)
            return self.given

    model, x = Items(), torch.randn(4, 3)
    model.named = Keeps()
    passed(model, x, lambda run: run.set("named:low", torch.zeros(4, 3)))
    assert torch.equal(model.named.given["low"], x * 3 - 1)


def test_one_call_or_all_calls_of_a_module():
    model, x = Thrice(), torch.randn(4, 3)

    def output(call):
        with HookedModel(model).run(rows(x)) as run:
            run.set("cell", lambda h: h + 1, call=call)
        return run.output["output"]

    cell = model.cell
    assert_close(output(1), cell(cell(cell(x)) + 1).detach())
    assert_close(output("all"), (cell(cell(cell(x) + 1) + 1) + 1).detach())


def test_copies_run_the_rest_of_the_network_on_every_version():
    model, x, ran = Mlp(), torch.randn(5, 3), []
    versions = torch.randn(7, 5, 4)
    model[0].register_forward_hook(lambda *_: ran.append(0))
    with HookedModel(model).run(rows(x)) as run:
        run.set("1", versions, copies=7)
    assert_close(run.output["output"], torch.stack([tail(model, v) for v in versions]))
    assert ran == [0]


def test_a_gradient_is_bent_on_its_way_back_and_read_as_written_before_or_after():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU(inplace=True)), torch.randn(5, 3)
    for frozen in (False, True):
        with HookedModel(model.requires_grad_(not frozen)).run(rows(x)) as run:
            grad, before = run.get_grad("0"), run.get_grad("1")
            run.set_grad("1", lambda g: g * 10)
            after = run.get_grad("1")
            run.backward(lambda out: out["output"].sum())
        active = (model[1](model[0](x)) > 0).float()
        assert_close(before.resolve(), active)
        assert_close(after.resolve(), 10 * active)
        assert_close(grad.resolve(), 10 * active @ model[1].weight.detach())


LOUD = {
    "nothing returned": (lambda h: None, "setting the output of '0': the function returned None; return the new value"),
    "in place, nothing returned": (
        lambda h: (h.zero_(), None)[1],
        "the function changed it in place and returned None; return the new value",
    ),
    "shape": (torch.zeros(4, 5), r"shape \(4, 5\) was given where the module has \(4, 4\)"),
    "broadcast": (torch.zeros(1, 4), r"shape \(1, 4\) was given where the module has \(4, 4\)"),
    "dtype": (lambda h: h.double(), "dtype torch.float64 was given where the module has torch.float32"),
    "device": (lambda h: h.to("meta"), "device meta was given where the module has cpu"),
    "no tensor": (3.0, "expected a tensor, got float"),
}


@pytest.mark.parametrize("case", LOUD)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_setting_that_does_not_fit_is_loud(case, mode):
    value, text = LOUD[case]
    with pytest.raises(SetterError, match=text), mode():
        passed(Mlp(), torch.randn(4, 3), lambda run: run.set("0", value))


def test_nothing_returned_is_loud_in_inference_mode_as_well():
    with pytest.raises(SetterError, match="returned None"), torch.inference_mode():
        passed(Mlp(), torch.randn(4, 3), lambda run: run.set("0", lambda h: None))


def test_copies_that_are_not_there_are_loud():
    with pytest.raises(SetterError, match=r"shape \(3, 4, 4\) was given where the module has \(2, 4, 4\)"):
        passed(Mlp(), torch.randn(4, 3), lambda run: run.set("0", torch.zeros(3, 4, 4), copies=2))


def test_a_bent_gradient_that_does_not_fit_is_loud():
    def bent(run):
        run.get_grad("0")
        run.set_grad("1", lambda g: None)
        run.backward(lambda out: out["output"].sum())

    with pytest.raises(SetterError, match="setting the gradient of '1': the function returned None"):
        passed(Mlp(), torch.randn(4, 3), bent)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda run: run.set("idle", torch.zeros(4, 3)),
            "output set at 'idle' was never used: its module never ran",
        ),
        (lambda run: run.set_input("idle", torch.zeros(4, 3)), "the input set at 'idle' was never used"),
        (lambda run: run.set("used", torch.zeros(4, 3), call=2), r"its module ran 1 time\(s\), not call 2"),
        (lambda run: run.set_grad("used", lambda g: g), "no gradient came back through it; read one with run.get_grad"),
        (lambda run: (run.stop("used"), run.set("idle", torch.zeros(4, 3))), "'idle' was never used"),
    ],
)
def test_a_setting_that_was_never_used_is_loud(change, text):
    with pytest.raises(SetterError, match=text):
        passed(Unused(), torch.randn(4, 3), change)


def test_a_value_of_the_same_pass_that_comes_later_is_loud():
    with pytest.raises(SetterError, match="the output of '2' does not exist yet, it comes later"):
        passed(Mlp(), torch.randn(4, 3), lambda run: run.set("0", run.get("2")))


def test_paths_are_checked_where_they_are_written():
    run = HookedModel(Mlp()).run(rows(torch.randn(4, 3)))
    for change in (run.set, run.set_input, run.set_grad):
        with pytest.raises(PathError, match="path '7' names no module of Mlp; there is '0', '1', '2'"):
            change("7", lambda h: h)
