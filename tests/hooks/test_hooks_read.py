"""What a run reads is what a forward or backward pass written out by hand has at that place."""

import pytest
import torch
from hooks_models import Cnn, Items, Mlp, Thrice, passed, rows
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.testing import assert_close

from tdhook_train import HookedModel
from tdhook_train.errors import KeyMissingError, PathError, ResolveError, TargetError


def hand_mlp(m, x):
    a = x @ m[0].weight.T + m[0].bias
    b = torch.tanh(a)
    c = b @ m[2].weight.T + m[2].bias
    return a, b, c, c.clamp_min(0)


def test_values_of_an_mlp_also_before_an_activation_in_place():
    model, x = Mlp(), torch.randn(5, 3)
    with HookedModel(model).run(rows(x)) as run:
        found = [run.get(str(i)) for i in range(4)]
    for proxy, expected in zip(found, hand_mlp(model, x), strict=True):
        assert_close(proxy.resolve(), expected)
        assert not proxy.resolve().requires_grad


def test_values_of_a_cnn_with_batch_norm_and_an_activation_in_place():
    model, x = Cnn().eval(), torch.randn(5, 2, 4, 4)
    with HookedModel(model).run(rows(x)) as run:
        norm, act, head_in = run.get("norm"), run.get("act"), run.get_input("head")
    conv = nn.functional.conv2d(x, model.conv.weight, model.conv.bias, padding=1)
    n = model.norm
    mean, var = n.running_mean[:, None, None], n.running_var[:, None, None]
    expected = (conv - mean) / (var + n.eps).sqrt() * n.weight[:, None, None] + n.bias[:, None, None]
    assert (expected < 0).any()
    assert_close(norm.resolve(), expected)
    assert_close(act.resolve(), expected.clamp_min(0))
    assert_close(head_in.resolve(), expected.clamp_min(0).flatten(1))


def test_a_tensordict_module_with_nested_keys_brings_its_own():
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    model = TensorDictSequential(
        TensorDictModule(first, in_keys=[("agents", "obs")], out_keys=[("agents", "hidden")]),
        TensorDictModule(second, in_keys=[("agents", "hidden")], out_keys=[("agents", "q")]),
    )
    obs = torch.randn(5, 3)
    td = TensorDict({"agents": TensorDict({"obs": obs}, [5])}, [5])
    hooked = HookedModel(model)
    with hooked.run(td) as run:
        hidden = run.get("module.0.module")
    assert hooked.in_keys == [("agents", "obs")]
    assert_close(hidden.resolve(), first(obs).detach())
    assert_close(run.output["agents", "q"], second(first(obs)).detach())
    assert set(td.keys(True, True)) == {("agents", "obs")}


def test_items_of_tuples_and_mappings():
    x = torch.randn(4, 3)
    with HookedModel(Items()).run(rows(x)) as run:
        first, second, last = run.get("split:0"), run.get("split:1"), run.get("split:-1")
        high = run.get("named:high")
    assert torch.equal(first.resolve(), x * 2)
    assert torch.equal(second.resolve(), x * 3)
    assert torch.equal(last.resolve(), x * 3)
    assert torch.equal(high.resolve(), x * 3 + 1)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("split", r"'split' names no tensor: module 'split' has a tuple there; did you mean 'split:1' or 'split:0'"),
        ("split:2", r"'split:2' names no tensor: .* did you mean 'split:1' or 'split:0'"),
        ("named:hihg", r"did you mean 'named:high'"),
    ],
)
def test_an_item_that_is_not_there(path, text):
    with pytest.raises(PathError, match=text):
        passed(Items(), torch.randn(4, 3), lambda run: run.get(path))


def test_an_item_of_a_lone_tensor_is_no_row_of_the_batch():
    with pytest.raises(PathError, match="'0:1' names no tensor: module '0' has a Tensor there; did you mean '0'"):
        passed(Mlp(), torch.randn(4, 3), lambda run: run.get("0:1"))


def test_the_calls_of_a_module_that_runs_three_times():
    model, x = Thrice(), torch.randn(4, 3)
    one = model.cell(x)
    two = model.cell(one)
    three = model.cell(two)
    with HookedModel(model).run(rows(x)) as run:
        first, second, every = run.get("cell"), run.get("cell", call=1), run.get("cell", call="all")
        entered = run.get_input("cell", call=2)
        never = run.get("cell", call=3)
    assert_close(first.resolve(), one.detach())
    assert_close(second.resolve(), two.detach())
    assert_close(torch.stack(every.resolve()), torch.stack([one, two, three]).detach())
    assert_close(entered.resolve(), two.detach())
    with pytest.raises(ResolveError, match=r"output of 'cell', call 3: its module ran 3 time\(s\)"):
        never.resolve()


def test_a_shared_module_answers_to_both_of_its_names():
    layer = nn.Linear(3, 3)
    model, x = nn.Sequential(layer, layer), torch.randn(4, 3)
    with HookedModel(model).run(rows(x)) as run:
        first, second = run.get("1", call=0), run.get("1", call=1)
    assert_close(first.resolve(), layer(x).detach())
    assert_close(second.resolve(), layer(layer(x)).detach())


def test_an_argument_given_by_name():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x, scale=x + 1)

    class Inner(nn.Module):
        def forward(self, x, *, scale):
            return x * scale

    x = torch.randn(4, 3)
    with HookedModel(Outer()).run(rows(x)) as run:
        first, scale = run.get_input("inner"), run.get_input("inner:scale")
        run.set_input("inner:scale", torch.ones(4, 3))
    assert torch.equal(first.resolve(), x)
    assert torch.equal(scale.resolve(), x + 1)
    assert torch.equal(run.output["output"], x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_also_before_an_activation_in_place_frozen_or_not(frozen, mode):
    model, x = Mlp().requires_grad_(not frozen), torch.randn(5, 3)
    with mode(), HookedModel(model).run(rows(x)) as run:
        before, after = run.get_grad("2"), run.get_grad("3")
        far, unused = run.get_grad("0"), run.get("4")
        run.backward(lambda out: out["output"].square().sum())
    with torch.enable_grad():
        _, b, c, d = hand_mlp(model, x)
        da, db = 1 - b.detach().square(), 2 * (d @ model[4].weight.T + model[4].bias).detach()
    grad_d = db @ model[4].weight.detach()
    grad_c = grad_d * (c > 0)
    assert_close(after.resolve(), grad_d)
    assert_close(before.resolve(), grad_c)
    assert_close(far.resolve(), grad_c @ model[2].weight.detach() * da)
    assert unused.resolve().shape == (5, 2)
    assert not x.requires_grad


def test_a_gradient_at_a_module_that_hands_its_input_on_leaves_the_input_alone():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(3, 1)).requires_grad_(False), torch.randn(4, 3)
    with HookedModel(model).run(rows(x)) as run:
        grad = run.get_grad("0")
        run.backward(lambda out: out["output"].sum())
    assert_close(grad.resolve(), model[1].weight.expand(4, 3))
    assert not x.requires_grad


def test_a_gradient_nothing_depends_on_is_zero_and_each_call_has_its_own():
    class Two(Thrice):
        def forward(self, x):
            self.cell(x)  # its output is dropped
            return self.cell(x)

    with HookedModel(Two()).run(rows(torch.randn(4, 3))) as run:
        every = run.get_grad("cell", call="all")
        run.backward(lambda out: out["output"].sum())
    dropped, used = every.resolve()
    assert not dropped.any()
    assert torch.equal(used, torch.ones(4, 3))


def test_backward_needs_one_number_and_the_outputs():
    def stopped(run):
        run.stop("0")
        run.backward(lambda out: out["output"].sum())

    with pytest.raises(TargetError, match=r"differentiates one number, got shape \(4, 2\)"):
        passed(Mlp(), torch.randn(4, 3), lambda run: run.backward(lambda out: out["output"]))
    with pytest.raises(TargetError, match="stopped before them"):
        passed(Mlp(), torch.randn(4, 3), stopped)


def test_a_value_does_not_exist_before_the_end_of_the_block():
    with HookedModel(Mlp()).run(rows(torch.randn(4, 3))) as run:
        value, grad = run.get("0"), run.get_grad("0")
        with pytest.raises(ResolveError, match="does not exist yet: the pass runs when its `with` block ends"):
            value.resolve()
        with pytest.raises(ResolveError, match="the pass has not run"):
            _ = run.output
    assert value.resolve().shape == (4, 4)
    with pytest.raises(ResolveError, match=r"gradient of '0' was never asked for: call run.backward"):
        grad.resolve()


def test_nothing_runs_after_a_stop():
    model, x, ran = Mlp(), torch.randn(4, 3), []
    model[2].register_forward_hook(lambda *_: ran.append(2))
    with HookedModel(model).run(rows(x)) as run:
        run.stop("1")
        here, after = run.get("1"), run.get("2")
    assert not ran
    assert_close(here.resolve(), torch.tanh(model[0](x)).detach())
    with pytest.raises(ResolveError, match="output of '2', call 0: its module never ran in this pass"):
        after.resolve()
    with pytest.raises(ResolveError, match="stopped before the outputs"):
        _ = run.output


def test_a_model_that_catches_exceptions_does_not_catch_the_stop():
    class Careful(Thrice):
        def forward(self, x):
            try:
                return self.cell(x)
            except Exception:
                return x

    with HookedModel(Careful()).run(rows(torch.randn(4, 3))) as run:
        run.stop("cell")
    with pytest.raises(ResolveError, match="stopped"):
        _ = run.output


@pytest.mark.parametrize("read", ["get", "get_input", "get_grad", "stop"])
def test_a_path_that_names_no_module(read):
    run = HookedModel(nn.ModuleDict({"encoder": nn.Linear(3, 3)})).run(rows(torch.randn(4, 3)))
    with pytest.raises(PathError, match="path 'encodr' names no module of ModuleDict; did you mean 'encoder'"):
        getattr(run, read)("encodr")
    with pytest.raises(PathError, match=r"'\*\*.encodr' names (no module of ModuleDict; did you mean|many modules)"):
        getattr(run, read)("**.encodr")


def test_paths_are_those_of_named_modules_on_the_model_that_was_given():
    model = TensorDictModule(Mlp(), ["input"], ["output"])
    run = HookedModel(model).run(rows(torch.randn(4, 3)))
    for path, _ in model.named_modules():
        run.get(path)
    for path in ("0", "module.0.weight", "module.", "_modules"):
        with pytest.raises(PathError, match="names no module of TensorDictModule; "):
            run.get(path)


def test_an_input_that_is_not_in_the_batch():
    with pytest.raises(KeyMissingError, match="input 'input' of Mlp is not in the batch; did you mean 'inputs'"):
        HookedModel(Mlp())(rows(torch.randn(4, 3), "inputs"))


def test_several_inputs_and_outputs_of_a_plain_module():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y, {"low": x - y, "name": "kept out"}

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    out = HookedModel(Two(), ["a", "b"], ["sum", "more"])(TensorDict({"a": x, "b": y}, [4]))
    assert torch.equal(out["sum"], x + y)
    assert torch.equal(out["more", "low"], x - y)
    assert ("more", "name") not in out.keys(True)


@pytest.mark.parametrize("how", ["torch.compile", "compile", "a submodule"])
def test_a_compiled_model_is_read_eagerly_and_not_compiled_again(how):
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    plain, x, path = Thrice(), torch.randn(4, 3), "cell"
    expected = plain.cell(x).detach()
    model = plain
    if how == "torch.compile":
        model = torch.compile(plain, backend=backend)
    elif how == "compile":
        plain.compile(backend=backend)
    else:
        plain.cell, path = torch.compile(plain.cell, backend=backend), "cell._orig_mod"
    model(x)
    before = len(compiled)
    with HookedModel(model).run(rows(x)) as run:
        value = run.get(path)
    assert_close(value.resolve(), expected)
    model(x)
    assert before == len(compiled) > 0
