"""What holds for every attribution, whatever it computes."""

from dataclasses import fields, replace

import pytest
import torch
from method_cases import CASES, measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.explain import Attribution, Compared, Perturbed

OTHERS = ("Conductance", "GradCam", "LayerIntegratedGradients", "Tcav")  # which say nothing of single inputs
ATTRIBUTIONS = [case for case in CASES if issubclass(case.make, Attribution) and case.make.__name__ not in OTHERS]
each = pytest.mark.parametrize("case", ATTRIBUTIONS, ids=lambda case: case.make.__name__)


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def plain(case, **changes):
    """The method on all rows, one by one, features one by one."""
    neutral = {"rows": None, "groups": None, "patch": None, "layers": None, "baseline": "zero"} | changes
    known = {f.name for f in fields(case.make)}
    return replace(case.method(), **{name: value for name, value in neutral.items() if name in known})


def found(method, model, td, **keys):
    """What the method wrote, but for the inputs and outputs."""
    out = measured(method, model, td, **keys)
    written = set(out.keys(True, True)) - set(td.keys(True, True))
    return {key: out[key] for key in written if key not in ("output", "o", "p")}


@each
def test_all_targets_at_once_are_each_alone(case):
    if case.method().joint:
        pytest.skip("all targets together have one share")
    model, td = mlp(3, 8, 2, activation=nn.ReLU), td_of(input=torch.randn(5, 3))
    both = found(plain(case, targets=[("output", 0), ("output", 1)]), model, td)
    for i in range(2):
        alone = found(plain(case, targets=("output", i)), model, td)
        assert alone
        for key, value in alone.items():
            assert_close(both[key].select(list(dims(case, both[key], key)).index("target"), i), value, equal_nan=True)


def dims(case, value, key):
    return plain(case, targets=[("output", 0), ("output", 1)]).dims(key, value.ndim)


@each
def test_a_row_does_not_know_the_rows_beside_it(case):
    model, x = mlp(3, 8, 2, activation=nn.ReLU), torch.randn(7, 3)
    every, first = (found(plain(case), model, td_of(input=value)) for value in (x, x[:1]))
    assert first
    for key, value in first.items():
        assert_close(every[key][:1], value, atol=1e-5, rtol=1e-4)


@each
def test_several_inputs_of_different_ranks(case):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.speed = nn.Conv2d(2, 3, 3), nn.Linear(3, 3)
            self.act, self.head = nn.ReLU(), nn.Linear(12 + 3, 2)

        def forward(self, pixels, speed):
            return self.head(torch.cat([self.act(self.image(pixels)).flatten(1), self.speed(speed)], 1))

    model, td = Two(), td_of(pixels=torch.randn(3, 2, 4, 4), speed=torch.randn(3, 3))
    if needs_images(case):
        pytest.skip("explains images alone")
    method = plain(case, targets=[("o", 0), ("o", 1)])
    out = found(method, model, td, in_keys=["pixels", "speed"], out_keys=["o"])
    for key in ("pixels", "speed"):
        value = out["attr", key]
        assert value.shape[-td[key].ndim + 1 :] == td[key].shape[1:]
        assert value.isfinite().all()
        assert value.any() or case.make.__name__ in ("VarGrad", "InputConductance")  # no kink near, or another way


def needs_images(case):
    return case.make.__name__ in ("Greydanus", "GradCam")


@each
def test_an_input_that_nothing_depends_on_has_no_share(case):
    if needs_images(case):
        pytest.skip("explains images alone")
    if case.make.__name__ == "Lime":
        pytest.skip("fits a line to samples of a curve: what is left of it falls on every feature")

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(3, 8, 2, activation=nn.ReLU)

        def forward(self, pixels, speed):
            return self.net(speed) + 0 * pixels.sum((1, 2, 3))[:, None]

    td = td_of(pixels=torch.randn(3, 1, 2, 2), speed=torch.randn(3, 3))
    targets = [("o", 0), ("o", 1)] if case.method().joint else ("o", 0)
    out = found(plain(case, targets=targets), Blind(), td, in_keys=["pixels", "speed"], out_keys=["o"])
    assert out["attr", "pixels"].abs().max() < 1e-6
    assert out["attr", "speed"].any()


@each
def test_targets_that_depend_on_nothing_have_no_share(case):
    if case.method().joint:
        pytest.skip("all targets together have one share")

    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = mlp(3, 8, 2, activation=nn.ReLU), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.net(x), self.scale.expand(len(x), 2)

    model, td = Still(), td_of(input=torch.randn(3, 3))
    out = found(plain(case, targets=[("o", 0), ("p", 1)]), model, td, out_keys=["o", "p"])
    assert not out["attr", "input"][:, 1].any()


@each
def test_a_mask_leaves_no_share(case):
    x, mask = torch.randn(4, 3), torch.tensor([[True, False, True]] * 4)
    td = TensorDict({"input": x, "mask": {"input": mask}}, [4])
    out = found(plain(case), mlp(3, 8, 2, activation=nn.ReLU), td)
    assert not out["attr", "input"][..., 1].any()
    assert out["attr", "input"][..., 0].any() or case.make.__name__ == "VarGrad"  # which no kink may be near


def test_the_kinds_are_there():
    kinds = {base: [c for c in ATTRIBUTIONS if issubclass(c.make, base)] for base in (Attribution, Compared, Perturbed)}
    assert all(kinds.values())
