"""IntegratedGradients against closed forms, its own completeness, and captum where it is installed."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import IntegratedGradients
from tdhook_train.errors import KeyMissingError, SettingsError, TargetError
from tdhook_train.latent import ActivationPatching


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


class Function(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


def test_a_linear_model_in_closed_form():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    out = measured(IntegratedGradients(points=1), model, td_of(input=x))
    assert out["attr", "input"].shape == (5, 4) if model.out_features == 1 else True
    many = measured(IntegratedGradients(targets=["output"], points=1), model, td_of(input=x))
    assert_close(many["attr", "input"], (model.weight * x[:, None, :]).detach())
    assert many["delta"].abs().max() < 1e-6


def test_two_inputs_that_are_added_do_not_alias_each_other():
    x, y = torch.tensor([[0.25], [1.0]]), torch.tensor([[0.5], [3.0]])
    model = Function(lambda x, y: ((x + y) ** 2).sum(1))
    with IntegratedGradients(targets="o", points=2).prepare(model, ["x", "y"], ["o"]) as hooked:
        out = hooked(td_of(x=x, y=y))
    # d/dx of t²(x + y)² integrated: x (x + y), and likewise for y
    assert_close(out["attr", "x"], x * (x + y))
    assert_close(out["attr", "y"], y * (x + y))
    assert_close(out["attr", "x"][1], torch.tensor([4.0]))
    assert out["delta"].abs().max() < 1e-5


def test_completeness_on_a_tanh_mlp():
    model, x = mlp(4, 32, 32, 2), torch.randn(20, 4) * 2
    base = torch.randn(20, 4)
    td = TensorDict({"input": x, "baseline": {"input": base}}, [20])
    out = measured(IntegratedGradients(targets=["output"]), model, td)
    rise = (model(x) - model(base)).detach()
    assert_close(out["attr", "input"].sum(2), rise, atol=1e-3, rtol=0)
    assert_close(out["delta"], out["attr", "input"].sum(2) - rise, atol=1e-5, rtol=0)


def test_the_error_of_the_quadrature_is_reported():
    model, x = Function(lambda x: (x**6).sum(1)), torch.ones(2, 3)
    rough = measured(IntegratedGradients(targets="output", points=1), model, td_of(input=x))
    exact = measured(IntegratedGradients(targets="output", points=3), model, td_of(input=x))
    assert_close(rough["delta"], torch.full((2,), 3 * (6 * 0.5**5 - 1)))
    assert_close(exact["delta"], torch.zeros(2), atol=1e-5, rtol=0)
    assert_close(exact["attr", "input"], torch.ones(2, 3))


def test_many_targets_equal_one_at_a_time():
    model, td = mlp(4, 8, 3), td_of(input=torch.randn(6, 4))
    targets = {"first": ("output", 0), "last": ("output", -1), "total": total}
    many = measured(IntegratedGradients(targets=targets), model, td)
    assert many["attr", "input"].shape == (6, 3, 4)
    for i, target in enumerate(targets.values()):
        one = measured(IntegratedGradients(targets=target), model, td)
        assert one["attr", "input"].shape == (6, 4)
        assert_close(many["attr", "input"][:, i], one["attr", "input"])
        assert_close(many["delta"][:, i], one["delta"])


def total(outputs):
    return outputs["output"].sum(1)


def test_a_long_path_is_cut_in_chunks_that_change_nothing():
    model, x = mlp(3, 8, 1), torch.randn(300, 3)  # 50 points of 300 rows: several passes
    out = measured(IntegratedGradients(targets="output"), model, td_of(input=x))
    few = measured(IntegratedGradients(targets="output"), model, td_of(input=x[:7]))
    assert_close(out["attr", "input"][:7], few["attr", "input"])


def test_tdhooks_own_form_of_targets_is_summed():
    def init_attr_targets(outputs, inputs):
        return TensorDict({"a": outputs["output"][:, 0], "b": outputs["output"][:, 2:]}, [len(outputs)])

    model, td = mlp(4, 8, 3), td_of(input=torch.randn(6, 4))
    found = measured(IntegratedGradients(init_attr_targets=init_attr_targets), model, td)
    both = measured(IntegratedGradients(targets=[("output", 0), ("output", 2)]), model, td)
    assert_close(found["attr", "input"], both["attr", "input"].sum(1))


def test_integer_inputs_do_not_move_and_get_no_attribution():
    table = nn.Embedding(5, 3)
    model = Function(lambda x, index: (x * table(index)).sum(1))
    x, index = torch.randn(6, 3), torch.randint(5, (6,))
    td = td_of(x=x, index=index)
    with IntegratedGradients(targets="o", points=4).prepare(model, ["x", "index"], ["o"]) as hooked:
        out = hooked(td)
    assert_close(out["attr", "x"], (x * table(index)).detach())
    assert set(out.keys(True, True)) == {"x", "index", "o", "delta", ("attr", "x")}
    with pytest.raises(KeyMissingError, match="needs a floating-point input, the model reads"):
        measured(IntegratedGradients(), Function(lambda x: x.float()), td_of(input=index))


def test_baselines():
    model, x = nn.Linear(4, 1), torch.randn(6, 4)
    given = torch.randn(6, 4)
    td = TensorDict({"input": x, "baseline": {"input": given}}, [6])
    weight = model.weight.detach()
    for baseline, batch, start in (
        ("zero", td_of(input=x), 0),
        ("mean", td_of(input=x), x.mean(0)),
        ("mean", td, given),
    ):
        out = measured(IntegratedGradients(targets="output", baseline=baseline), model, batch)
        assert_close(out["attr", "input"], weight * (x - start))


def test_at_most_so_many_rows_spread_evenly():
    model, x = nn.Linear(4, 1), torch.randn(10, 4)
    td = td_of(input=x)
    method = IntegratedGradients(targets="output", rows=4, baseline="mean")
    out = measured(method, model, td)
    index = [0, 2, 5, 7]
    assert_close(out["attr", "input"], model.weight.detach() * (x - x.mean(0))[index])
    assert out["delta"].shape == (4,)


def test_nested_keys_and_images():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 1))
    x = torch.randn(4, 2, 3, 3)
    td = TensorDict({"agents": {"pixels": x}}, [4])
    with IntegratedGradients(targets="o").prepare(model, [("agents", "pixels")], ["o"]) as hooked:
        out = hooked(td)
    gradient = torch.autograd.functional.jacobian(lambda v: model(v).sum(), x)
    assert_close(out["attr", "agents", "pixels"], gradient * x)  # the model is affine


def test_the_batch_is_not_asked_for_gradients():
    x = torch.randn(4, 4)
    measured(IntegratedGradients(), nn.Linear(4, 1), td_of(input=x))
    assert not x.requires_grad
    with torch.no_grad():
        out = measured(IntegratedGradients(), nn.Linear(4, 1), td_of(input=x))
    assert out["attr", "input"].any()
    assert not out["attr", "input"].requires_grad


def test_targets_that_cannot_be_explained_are_refused():
    td = td_of(input=torch.randn(4, 4))
    with pytest.raises(TargetError, match="has 3 features; explain one, or give a list"):
        measured(IntegratedGradients(targets="output"), nn.Linear(4, 3), td)
    with pytest.raises(SettingsError, match="targets or init_attr_targets, not both"):
        IntegratedGradients(targets="output", init_attr_targets=total)


def test_an_input_that_a_target_does_not_depend_on_gets_zeros():
    model = Function(lambda x, y: (x * 2, y * 3))
    x = torch.randn(4, 1)
    with IntegratedGradients(targets=["a"], points=2).prepare(model, ["x", "y"], ["a", "b"]) as hooked:
        out = hooked(td_of(x=x, y=x))
    assert_close(out["attr", "x"][:, 0], 2 * x)
    assert not out["attr", "y"].any()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_target_that_depends_on_no_input_gets_zeros(frozen):
    class Policy(nn.Module):
        """A scale that does not depend on the state, as in most PPO policies."""

        def __init__(self):
            super().__init__()
            self.loc, self.log_scale = nn.Linear(4, 2), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            loc = self.loc(x)
            return loc, self.log_scale.exp().expand_as(loc)

    model, x = Policy().requires_grad_(not frozen), torch.randn(4, 4)
    with IntegratedGradients(targets=["loc", "scale"]).prepare(model, ["x"], ["loc", "scale"]) as hooked:
        out = hooked(td_of(x=x))
    assert_close(out["attr", "x"][:, :2], (model.loc.weight * x[:, None]).detach())
    assert not out["attr", "x"][:, 2:].any()


def test_in_inference_mode():
    model, x = nn.Linear(4, 1), torch.randn(4, 4)
    with torch.inference_mode():
        out = measured(IntegratedGradients(targets="output"), model, td_of(input=x))
    assert_close(out["attr", "input"], model.weight.detach() * x)


@pytest.mark.parametrize("target", [0, 1])
def test_the_values_of_captum(target):
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    model, x = mlp(4, 16, 16, 2), torch.randn(12, 4)
    base = torch.randn(12, 4)
    expected, delta = captum.IntegratedGradients(model).attribute(
        x, base, target=target, n_steps=50, method="gausslegendre", return_convergence_delta=True
    )
    td = TensorDict({"input": x, "baseline": {"input": base}}, [12])
    out = measured(IntegratedGradients(targets=("output", target)), model, td)
    assert_close(out["attr", "input"], expected.float(), atol=1e-5, rtol=0)
    assert_close(out["delta"], delta.float(), atol=1e-5, rtol=0)


class Chooses(nn.Module):
    """Gives out what it chose before the scores it chose by, as a TorchRL actor does."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(3, 2)

    def forward(self, x):
        scores = self.scores(x)
        return scores.argmax(-1, keepdim=True), scores


@pytest.mark.parametrize("method", [IntegratedGradients, ActivationPatching])
def test_the_default_target_is_the_first_that_can_be_differentiated(method):
    model, td = Chooses(), TensorDict({"input": torch.randn(8, 3)}, [8])
    with method().prepare(model, out_keys=["chosen", "scores"]) as hooked:
        hooked(td)
    with (
        method(targets="chosen").prepare(model, out_keys=["chosen", "scores"]) as hooked,
        pytest.raises(TargetError, match=r"target 'chosen' is torch.int64; choose a floating-point output"),
    ):
        hooked(td)


@pytest.mark.parametrize("method", [IntegratedGradients, ActivationPatching])
def test_a_misspelt_target_and_a_bare_tensor_are_named(method):
    with (
        pytest.raises(TargetError, match=r"target 'outpt.1' is given out by no network; did you mean 'output'"),
        method(targets=("outpt", 1)).prepare(nn.Linear(3, 2)),
    ):
        pass  # found before anything runs
    with (
        method().prepare(nn.Linear(3, 2)) as hooked,
        pytest.raises(SettingsError, match=r"takes a TensorDict, e.g. TensorDict\(input=x"),
    ):
        hooked(torch.randn(8, 3))
