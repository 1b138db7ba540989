"""What flows through a concept: projected gradients by hand, conductance, the concept as what is explained."""

import pytest
import torch
from method_cases import above_zero, batch, measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.func import jacrev, vmap
from torch.testing import assert_close

from tdhook_train.attribution import ConceptAttribution, FeatureAblation, InputXGradient, IntegratedGradients, Saliency
from tdhook_train.errors import NetworkError, PathError, SettingsError

BOTH = [("output", 0), ("output", 1)]


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def unit(*shape):
    direction = torch.randn(*shape)
    return direction / direction.norm()


def through(model, x, start, u):
    """∂F/∂h · u · u · ∂h/∂x of every output, by Jacobians: [row, target, feature]."""
    before, after = model[:start], model[start:]
    back = vmap(jacrev(after))(before(x))
    return ((back @ u)[..., None] * u) @ vmap(jacrev(before))(x)


def test_only_the_gradient_along_the_direction_goes_on():
    model, x, u = mlp(3, 6, 5, 2), torch.randn(7, 3), unit(6)
    expected = through(model, x, 2, u).detach()
    for direction in (u.tolist(), 3 * u, (-u).tolist()):  # of any length, and either way round
        found = measured(ConceptAttribution(Saliency(), "1", direction), model, td_of(input=x))
        assert_close(found["attr", "input"], expected)
        assert_close(found["direction", "1"].abs(), u.abs())
    found = measured(ConceptAttribution(InputXGradient(targets=BOTH), "1", u), model, td_of(input=x))
    assert_close(found["attr", "input"], expected * x[:, None])
    assert not measured(Saliency(), model, td_of(input=x))["attr", "input"].allclose(expected)  # and nothing stays


@pytest.mark.parametrize("method", [Saliency(), InputXGradient(targets=BOTH), IntegratedGradients(points=7)])
def test_over_a_basis_the_shares_add_up_to_the_methods_own(method):
    model, td = mlp(3, 6, 5, 2), batch(7)
    basis = torch.linalg.qr(torch.randn(5, 5)).Q
    parts = [measured(ConceptAttribution(method, "3", u), model, td)["attr", "input"] for u in basis]
    assert_close(sum(parts), measured(method, model, td)["attr", "input"], atol=1e-5, rtol=1e-4)


def test_along_the_path_it_is_the_conductance_of_the_direction():
    model, x, u = mlp(3, 6, 5, 2), torch.randn(4, 3), unit(6)
    found = measured(ConceptAttribution(IntegratedGradients(points=300), "1", u), model, td_of(input=x))
    # Dhamdhere et al. 2018, eq. 2: ∫ ∂F/∂h·u d(h·u), here as a sum over 4,000 steps of the activation itself
    at = torch.linspace(0, 1, 4001)[:, None, None]
    h = model[:2](at * x).detach()
    slopes = vmap(vmap(jacrev(model[2:])))((h[1:] + h[:-1]) / 2) @ u
    expected = (slopes * ((h[1:] - h[:-1]) @ u)[..., None]).sum(0).detach()
    assert_close(found["attr", "input"].sum(-1), expected, atol=1e-5, rtol=1e-4)


def test_channels_at_every_position():
    class Cnn(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2))

    model, x = Cnn(), torch.randn(3, 2, 6, 6)
    found = measured(ConceptAttribution(Saliency(), "0", [0, 0, 1, 0]), model, td_of(input=x))["attr", "input"]
    only = Cnn()
    only.load_state_dict(model.state_dict())
    weight = only[3].weight.data.view(2, 4, 16)
    weight[:, [0, 1, 3]] = 0  # the other channels lead nowhere
    assert_close(found, measured(Saliency(), only, td_of(input=x))["attr", "input"])


def test_the_concept_itself_as_what_is_explained():
    model, x, u = mlp(3, 6, 5, 2), torch.randn(7, 3), unit(6)
    td = td_of(input=x)
    slope = (u @ vmap(jacrev(model[:2]))(x)).detach()
    found = measured(ConceptAttribution(Saliency(), "1", u, explains="concept"), model, td)
    assert_close(found["attr", "input"], slope)
    rise = ((model[:2](x) - model[:2](0 * x)) @ u).detach()
    by_path = measured(ConceptAttribution(IntegratedGradients(rows_per_pass=5), "1", u, explains="concept"), model, td)
    assert_close(by_path["attr", "input"].sum(-1), rise, atol=1e-5, rtol=1e-4)
    without = measured(ConceptAttribution(FeatureAblation(max_bytes=1), "1", u, explains="concept"), model, td)
    changed = torch.cat([x[:, :1], 0 * x[:, 1:2], x[:, 2:]], 1)
    assert_close(without["attr", "input"][:, 1], ((model[:2](x) - model[:2](changed)) @ u).detach())


def test_where_the_direction_comes_from():
    model, td = mlp(3, 6, 5, 2), batch(40)
    h, marks = model[:2](td["input"]).detach(), above_zero(td)
    found = measured(ConceptAttribution(Saliency(), "1", concept=above_zero), model, td)["direction", "1"]
    between = h[marks].mean(0) - h[~marks].mean(0)
    assert_close(found, between / between.norm())
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    fitted = linear_model.LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000).fit(h.double(), marks)
    normal = torch.as_tensor(fitted.coef_[0])
    method = ConceptAttribution(Saliency(), "1", concept=above_zero, cav="logistic", C=0.5)
    assert_close(measured(method, model, td)["direction", "1"].double(), normal / normal.norm(), atol=1e-5, rtol=1e-4)
    given = td.clone()
    given["concept", "1"] = between.expand(40, 6)
    from_batch = measured(ConceptAttribution(Saliency(), "1"), model, given)
    assert_close(from_batch["direction", "1"], between / between.norm())


@pytest.mark.parametrize("explains", ["outputs", "concept"])
def test_rows_and_passes_change_nothing(explains):
    model, td = mlp(3, 6, 5, 2), batch(12)
    method = IntegratedGradients(points=5)
    whole, cut = (
        measured(ConceptAttribution(how, "1", unit, explains=explains), model, td)["attr", "input"]
        for unit in [(1, 2, 3, 4, 5, 6)]
        for how in (method, IntegratedGradients(points=5, rows_per_pass=3))
    )
    assert_close(whole, cut)
    one = measured(ConceptAttribution(method, "1", (1, 2, 3, 4, 5, 6), explains=explains), model, td[3:4])
    assert_close(one["attr", "input"], whole[3:4])


def test_layers_before_it_are_sites_and_reductions_hold():
    model, x, u = mlp(3, 6, 5, 2), torch.randn(7, 3), unit(5)
    method = Saliency(layers="1", reduction="mean_abs")
    found = measured(ConceptAttribution(method, "3", u), model, td_of(input=x))
    assert_close(found["attr", "1"], through(model[2:], model[:2](x), 2, u).abs().mean(0).detach())


def test_what_cannot_be_conditioned_is_refused():
    model, td = mlp(3, 6, 5, 2), batch()
    with pytest.raises(PathError, match="'9' matches no module"):
        measured(ConceptAttribution(Saliency(), "9", (1.0,)), model, td)
    with pytest.raises(NetworkError, match=r"direction has \(1,\); '1' has 6 units"):
        measured(ConceptAttribution(Saliency(), "1", (1.0,)), model, td)
    with pytest.raises(NetworkError, match="has no length"):
        measured(ConceptAttribution(Saliency(), "1", (0.0,) * 6), model, td)
    with pytest.raises(NetworkError, match="no gradient of Saliency came through '1'"):
        measured(ConceptAttribution(Saliency(targets=lambda td: td["input"].sum(1)), "1", (1.0,) * 6), model, td)
    with pytest.raises(SettingsError, match="needs direction, concept, or a direction in the batch"):
        measured(ConceptAttribution(Saliency(), "1"), model, td)
    with pytest.raises(SettingsError, match="24 of 24 do"):
        measured(ConceptAttribution(Saliency(), "1", concept=lambda td: td["input"][:, 0] < 99), model, td)
