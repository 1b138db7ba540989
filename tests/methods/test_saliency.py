"""Saliency is the gradient, for every target, with the sign that was asked for."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.errors import KeyMissingError, SettingsError, TargetError


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def jacobian(model, x):
    """Every output of every row with respect to that row, ``[row, output, input]``, by torch's own forward mode."""
    return torch.func.vmap(torch.func.jacfwd(model))(x).detach()


def test_every_output_by_default_equals_the_jacobian():
    model, x = mlp(3, 8, 4), torch.randn(6, 3)
    assert_close(measured(Saliency(), model, td_of(input=x))["attr", "input"], jacobian(model, x))


@pytest.mark.parametrize(("score", "change"), [("absolute", torch.abs), ("squared", torch.square)])
def test_absolute_and_squared(score, change):
    model, x = mlp(3, 8, 4), torch.randn(6, 3)
    found = measured(Saliency(score=score, targets=("output", 2)), model, td_of(input=x))["attr", "input"]
    assert_close(found, change(jacobian(model, x)[:, 2]))


def test_one_target_alone_has_no_dimension_of_its_own_and_a_mapping_names_them():
    model, x = mlp(3, 8, 4), torch.randn(6, 3)
    targets = {"first": ("output", 0), "gap": lambda out: out["output"][:, 1] - out["output"][:, 0]}
    found = measured(Saliency(targets=targets), model, td_of(input=x))["attr", "input"]
    expected = jacobian(model, x)
    assert_close(found, torch.stack([expected[:, 0], expected[:, 1] - expected[:, 0]], 1))
    assert measured(Saliency(targets=("output", 1)), model, td_of(input=x))["attr", "input"].shape == (6, 3)


def test_several_inputs_one_of_them_an_index_and_nested_keys():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, x, index):
            return (x * self.table(index)).sum(-1)

    net, x, index = Looks(), torch.randn(6, 3), torch.arange(6) % 5
    model = TensorDictModule(net, [("agent", "x"), ("agent", "index")], [("agent", "q")])
    td = TensorDict({"agent": TensorDict({"x": x, "index": index}, [6])}, [6])
    out = measured(Saliency(targets=("agent", "q")), model, td)
    assert_close(out["attr", "agent", "x"], net.table(index).detach())
    assert ("attr", "agent", "index") not in out.keys(True)
    with pytest.raises(KeyMissingError, match="Saliency needs a floating-point input"):
        measured(Saliency(), net.table, td_of(input=index))


def test_images_keep_their_shape_and_rows_are_spread_evenly():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(9, 2, 4, 4)
    found = measured(Saliency(rows=3), model, td_of(input=x))
    every = measured(Saliency(), model, td_of(input=x))
    assert found["attr", "input"].shape == (3, 2, 2, 4, 4)
    assert_close(found["attr", "input"], every["attr", "input"][[0, 3, 6]])


@pytest.mark.parametrize("kind", [Saliency, IntegratedGradients])
def test_what_is_explained_are_the_inputs_also_where_the_model_writes_over_them(kind):
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    model = TensorDictModule(layer, ["x"], ["x"])
    out = measured(kind(targets=("x", 0)), model, td_of(x=x))
    weight = layer.weight[0].detach().expand(4, 3)
    assert_close(out["attr", "x"], weight * x if kind is IntegratedGradients else weight)
    assert_close(out["x"], layer(x).detach())


def test_tdhooks_own_form_of_targets():
    model, x = mlp(3, 8, 4), torch.randn(6, 3)

    def init_attr_targets(targets, inputs):
        assert torch.equal(inputs["input"], x)
        return TensorDict(out=targets["output"][..., 1:3], batch_size=targets.batch_size)

    found = measured(Saliency(init_attr_targets=init_attr_targets), model, td_of(input=x))["attr", "input"]
    assert_close(found, jacobian(model, x)[:, 1:3].sum(1))
    with pytest.raises(SettingsError, match="Saliency takes targets or init_attr_targets, not both"):
        Saliency(targets="output", init_attr_targets=init_attr_targets)


@pytest.mark.parametrize("kind", [Saliency, IntegratedGradients])
def test_a_function_reads_the_other_keys_of_the_batch(kind):
    torch.manual_seed(0)
    model, td = mlp(4, 8, 3), td_of(input=torch.randn(6, 4), klass=torch.tensor([2, 0, 1, 1, 2, 0]))

    def true_class(td):
        return td["output"].gather(1, td["klass"][:, None])[:, 0]

    found = measured(kind(targets=true_class, rows=4), model, td)["attr", "input"]
    every = measured(kind(targets=[("output", i) for i in range(3)], rows=4), model, td)["attr", "input"]
    index = torch.tensor([0, 1, 3, 4])
    assert_close(found, every[torch.arange(4), td["klass"][index]])


def test_a_target_of_several_features_is_refused():
    with pytest.raises(TargetError, match="target 'output' has 4 features; explain one, or give a list"):
        measured(Saliency(targets="output"), mlp(3, 8, 4), td_of(input=torch.randn(6, 3)))


def cnn():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize("score", ["signed", "absolute"])
@pytest.mark.parametrize(("model", "shape"), [(mlp(4, 16, 16, 2), (12, 4)), (cnn(), (5, 2, 6, 6))], ids=["mlp", "cnn"])
def test_the_values_of_captum(model, shape, score):
    captum = pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")
    x = torch.randn(shape)
    both = measured(Saliency(targets=[("output", 0), ("output", 1)], score=score), model, td_of(input=x))
    for target in (0, 1):
        expected = captum.Saliency(model).attribute(x.clone().requires_grad_(), target=target, abs=score == "absolute")
        assert expected.any()
        assert_close(both["attr", "input"][:, target], expected)
