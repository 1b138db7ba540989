"""What holds for every public method."""

import pickle
from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
import torch
from method_cases import CASES, PUBLIC, Attending, batch, measured, mlp
from torch import nn

from tdhook_train.errors import PathError, SettingsError
from tdhook_train.latent import RidgeProbe
from tdhook_train.method import Method

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.make.__name__)


def test_every_public_method_has_a_row():
    assert {case.make for case in CASES} == PUBLIC


@each
def test_settings_are_a_frozen_dataclass_that_pickles_and_compares(case):
    method = case.method()
    assert is_dataclass(method)
    assert pickle.loads(pickle.dumps(method)) == method == case.method()
    assert case.make(**(case.settings | case.other)) != method
    assert method.settings()["method"] == case.make.__name__
    for f in fields(method):
        with pytest.raises(FrozenInstanceError):
            setattr(method, f.name, None)


@each
def test_settings_are_refused_when_they_are_made(case):
    for name, values in case.refused.items():
        for value in values:
            with pytest.raises(SettingsError, match=r"needs|is none of|is no key"):
                case.make(**(case.settings | {name: value}))


@each
def test_a_list_of_layers_is_the_tuple_of_them(case):
    if "layers" not in {f.name for f in fields(case.make)}:
        pytest.skip("reads no layers")
    listed, given = (case.make(**(case.settings | {"layers": layers})) for layers in (["0", "1"], ("0", "1")))
    assert listed == given
    assert hash(listed.layers) == hash(given.layers)


@each
def test_it_writes_what_it_declares_and_names_every_dimension(case):
    td, method = batch(), case.method()
    out = measured(method, mlp(3, 5, 2, activation=case.activation), td)
    written = set(out.keys(True, True)) - set(td.keys(True, True)) - {"output"}
    assert written == case.keys
    for key in written:
        names = method.dims(key, out[key].ndim)
        assert len(names) == out[key].ndim
    assert torch.equal(out["input"], td["input"])


def everything(model, td):
    return {
        "state": {key: value.tolist() for key, value in model.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()] + [v.requires_grad for v in td.values()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(d) for module in model.modules() for name, d in vars(module).items() if name.endswith("_hooks")],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "batch": {key: value.tolist() for key, value in td.items(True, True)},
        "rng": torch.get_rng_state().tolist(),
    }


def model_in_training(activation=nn.ReLU):
    inside = activation() if issubclass(activation, Attending) else nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), inside, nn.Linear(5, 2), nn.Dropout(0.5))
    model(torch.randn(8, 3)).sum().backward()
    model[3].weight.requires_grad_(False)
    return model


@each
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_the_model_and_the_batch_are_left_as_found(case, mode):
    model, td = model_in_training(case.activation).eval(), batch()
    before = everything(model, td)
    with mode():
        measured(case.method(), model, td)
    assert everything(model, td) == before


@each
def test_a_model_in_training_is_left_as_found(case):
    model, td = model_in_training(case.activation).train(), batch()
    before = everything(model, td)
    measured(case.method(), model, td)
    assert everything(model, td) == before


class Failing(nn.Module):
    """Fails from its third pass on: in the method, after the trace and the shared pass."""

    def __init__(self, error, after, activation):
        super().__init__()
        self.inner, self.error, self.left = mlp(3, 5, 2, activation=activation), error, after

    def forward(self, x):
        h = self.inner[0](x)
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.inner[2](self.inner[1](h))


@each
@pytest.mark.parametrize("error", [RuntimeError("in the pass"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_the_model_is_left_as_found_where_a_pass_fails(case, error, after):
    model, td = Failing(error, after, case.activation), batch()
    settings = case.settings | ({"layers": ("inner.0", "inner.1")} if "layers" in case.settings else {})
    settings |= {"at": "inner.0"} if "at" in case.settings else {}
    settings |= {"head": "inner.2"} if "head" in case.settings else {}
    before = everything(model, td)
    try:
        measured(case.make(**settings), model, td)
    except type(error):
        pass
    else:
        assert after == 2  # the methods that make no pass of their own
    assert everything(model, td) == before


@each
def test_the_model_is_left_as_found_where_measuring_itself_fails(case, monkeypatch):
    model, td = mlp(3, 5, 2, activation=case.activation), batch()
    before = everything(model, td)

    def measure(self, seen, model):
        with model.run(td) as run:
            run.set("0", lambda h: h * 2)
            raise ZeroDivisionError

    monkeypatch.setattr(case.make, "measure", measure)
    with pytest.raises(ZeroDivisionError):
        measured(case.method(), model, td)
    assert everything(model, td) == before


@each
def test_a_layer_that_is_not_there_is_refused(case):
    if "layers" not in case.settings:
        pytest.skip("reads no layers")
    with pytest.raises(PathError, match="'9' matches no module of Sequential"):
        measured(case.make(**(case.settings | {"layers": "9"})), mlp(3, 5, 2), batch())


@each
def test_the_same_twice(case):
    model, td, method = mlp(3, 5, 2, activation=case.activation), batch(), case.method()
    with method.prepare(model) as hooked:
        one, two = hooked(td), hooked(td)
    for key in case.keys:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0, equal_nan=True)


def test_the_contract_refuses_what_a_method_did_not_declare():
    method = RidgeProbe(target="y")
    with pytest.raises(SettingsError, match="RidgeProbe gave 'other', which its `writes` does not name"):
        method.dims("other", 1)
    with pytest.raises(SettingsError, match="gave 'r2' in 3 dimensions, declared as 'layer target'"):
        method.dims("r2", 3)
    assert issubclass(type(method), Method)
