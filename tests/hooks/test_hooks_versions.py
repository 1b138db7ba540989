"""Many versions of one activation: the pass with a version dimension, the pass over all rows and a loop agree."""

import pytest
import torch
from hooks_models import Cnn, Mlp, Residual, rows
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close

from tdhook_train import HookedModel
from tdhook_train.hooks.versions import run_versions


class Strict(nn.Module):
    """Insists on two dimensions, as much of people's code does."""

    def __init__(self, error):
        super().__init__()
        self.body, self.head, self.error = nn.Linear(3, 4), nn.Linear(4, 2), error

    def forward(self, x):
        h = self.body(x)
        if h.ndim != 2:
            raise self.error
        return self.head(h)


class OverRows(nn.Module):
    """Normalises over the last but one dimension: with a version dimension in front this means something else."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.body(x)
        return self.head(h - h.mean(0))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(7, 2)

    def forward(self, x):
        return self.head(torch.cat([self.body(x), x], 1))


class Heads(nn.Module):
    """The second output does not depend on the body."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x)), self.other(x)


def norm_mlp():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model


NETS = {
    "mlp": (Mlp, (3,), "1", True),
    "residual": (Residual, (3,), "inner", True),
    "convolution and flatten": (Cnn, (2, 4, 4), "norm", False),
    "flatten after a convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)),
        (2, 4, 4),
        "0",
        False,
    ),
    "batch norm of as many channels as rows": (norm_mlp, (3,), "0", False),
    "asserts two dimensions": (lambda: Strict(AssertionError("two dimensions")), (3,), "body", False),
    "raises its own error": (lambda: Strict(Exception("two dimensions")), (3,), "body", False),
    "rows in another place": (OverRows, (3,), "body", None),
    "concatenates": (Concat, (3,), "body", False),
}


@pytest.mark.parametrize("name", NETS)
def test_every_way_gives_what_a_loop_gives(name):
    make, shape, site, ahead = NETS[name]
    model = make().eval()
    hooked, td = HookedModel(model), rows(torch.randn(5, *shape))
    with hooked.run(td) as run:
        value = run.get(site)
    value = value.resolve()
    versions = torch.stack([value, torch.randn_like(value), value * 2, torch.zeros_like(value)])
    expected = []
    for version in versions:
        handle = model.get_submodule(site).register_forward_hook(lambda _m, _a, _o, v=version: v.clone())
        expected.append(model(td["input"].clone()).detach())
        handle.remove()
    calls = []
    model.register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    found = run_versions(hooked, td, site, versions, run.output.select("output"))
    assert found.batch_size == (20,)
    assert_close(found["output"], torch.cat(expected))
    assert calls == {True: [5], False: [5, 20], None: [5, 20, 5, 5, 5, 5]}[ahead]


def test_an_output_that_does_not_depend_on_the_site_is_repeated():
    model, td = Heads(), rows(torch.randn(5, 3))
    hooked = HookedModel(model, out_keys=["a", "b"])
    with hooked.run(td) as run:
        value = run.get("body")
    versions = torch.stack([value.resolve(), value.resolve() + 1])
    found = run_versions(hooked, td, "body", versions, run.output.select("a", "b"))
    assert_close(found["b"], model.other(td["input"]).detach().repeat(2, 1))
    assert_close(found["a"], model.head(versions).flatten(0, 1).detach())


def test_nested_keys_of_a_tensordict_module():
    linear, act = nn.Linear(3, 4), nn.Tanh()
    model = TensorDictModule(nn.Sequential(linear, act), [("agents", "obs")], [("agents", "q")])
    x = torch.randn(5, 3)
    td = TensorDict({"agents": {"obs": x}}, [5])
    hooked, h = HookedModel(model), linear(x).detach()
    versions = torch.stack([h, h + 1])
    expected = hooked(td).select(("agents", "q")).detach()
    found = run_versions(hooked, td, "module.0", versions, expected)
    assert_close(found["agents", "q"], versions.tanh().flatten(0, 1))
    assert set(td.keys(True, True)) == {("agents", "obs")}
