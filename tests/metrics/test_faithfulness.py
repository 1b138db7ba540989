"""Metrics of attributions against loops written from their papers, closed forms, and captum."""

import copy
import itertools
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train import ArtifactBuffer, Every, Observer, ProbeSet
from tdhook_train.attribution import FeatureAblation, InputXGradient, IntegratedGradients, Saliency
from tdhook_train.errors import NetworkError, PathError, SettingsError
from tdhook_train.explain import Problem
from tdhook_train.explain.judged import repeatable
from tdhook_train.hooks import HookedModel
from tdhook_train.method import Seen
from tdhook_train.metrics import (
    Aopc,
    CascadingRandomisation,
    Comprehensiveness,
    Deletion,
    Infidelity,
    Insertion,
    MaxSensitivity,
    Stability,
    Sufficiency,
    attribution_stability,
)
from tdhook_train.metrics.cascading_randomisation import _randomise
from tdhook_train.ops.likeness import cosine, cosine_by_chance

NO_CAPTUM = "captum is not installed; `make peers` runs this where it is"
TARGETS = [("output", 0), ("output", 1)]
RELATIVES = ("normalised", "chance_normalised", "relative")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mlp(*widths):
    layers = [one for pair in itertools.pairwise(widths) for one in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def measured(method, model, td, **known):
    """The artifacts of one method on one model, by hand."""
    with method.prepare(model) as hooked:
        return hooked(td, **known)


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def order_of(shares):
    """Features from the largest share to the smallest, the first of equals first."""
    return sorted(range(len(shares)), key=lambda i: (-float(shares[i]), i))


def kept(model, row, base, features, target):
    """The output with only some features; the others are the baseline's."""
    point = base.clone()
    point[features] = row[features]
    return float(model(point[None])[0, target])


def curves(model, x, base, attr, counts, first):
    """For each row, target and number of features: without the first ones, or with only these."""
    out = torch.zeros(len(x), attr.shape[1], len(counts))
    for row, target, (at, n) in itertools.product(range(len(x)), range(attr.shape[1]), enumerate(counts)):
        order = order_of(attr[row, target])
        out[row, target, at] = kept(model, x[row], base[row], order[:n] if first else order[n:], target)
    return out


@pytest.fixture
def given():
    model, x, base = mlp(6, 12, 2), torch.randn(5, 6), torch.randn(5, 6)
    td = TensorDict({"input": x, "baseline": {"input": base}}, [5])
    of = IntegratedGradients(TARGETS, points=8)
    return model.requires_grad_(False), x, base, td, of, measured(of, model, td)["attr", "input"]


@pytest.mark.parametrize(("kind", "first"), [(Deletion, False), (Insertion, True)])
@pytest.mark.parametrize("steps", [3, 6, 20])
def test_deletion_and_insertion_as_a_loop_over_features(given, kind, first, steps):
    model, x, base, td, of, attr = given
    found = measured(kind(of, steps=steps, reduction="none"), model, td)
    expected = curves(model, x, base, attr, [ceil(s * 6 / steps) for s in range(steps + 1)], first)
    assert_close(found["curve"], expected)
    auc = torch.as_tensor(np.trapezoid(expected.numpy(), dx=1 / steps))
    assert_close(found["auc"], auc)
    rise = model(x) - model(base)
    assert_close(found["rise"], rise)
    assert_close(found["normalised"], (auc - model(base)) / rise, rtol=1e-4, atol=1e-5)
    mean = measured(kind(of, steps=steps), model, td)
    assert_close(mean["auc"], auc.mean(0))
    assert_close(mean["normalised"], ((auc - model(base)) * rise.sign()).sum(0) / rise.abs().sum(0))


def test_the_order_is_by_sign_or_by_magnitude(given):
    model, x, base, td, of, attr = given
    found = measured(Deletion(of, steps=6, by="magnitude", reduction="none"), model, td)
    assert_close(found["curve"], curves(model, x, base, attr.abs(), range(7), first=False))


def test_chance_is_the_mean_over_all_orders():
    model, x = mlp(3, 8, 2).requires_grad_(False), torch.randn(4, 3)
    found = measured(Deletion(Saliency(), steps=3, orders=3000, reduction="none"), model, td_of(input=x))
    every = [
        [[kept(model, row, torch.zeros(3), list(order[n:]), t) for n in range(4)] for t in range(2)]
        for row in x
        for order in itertools.permutations(range(3))
    ]
    auc = torch.tensor(np.trapezoid(every, dx=1 / 3)).view(4, 6, 2).mean(1)
    # 3000 draws of a spread below 1: a standard error of .02
    assert_close(found["chance_auc"], auc.float(), atol=0.05, rtol=0)


def test_an_attribution_that_is_right_deletes_faster_than_chance():
    weight = torch.tensor([[4.0, 2.0, 1.0, 0.5]])
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = weight
    found = measured(Deletion(InputXGradient(), steps=4), model, td_of(input=torch.ones(3, 4)))
    total = torch.tensor([7.5, 3.5, 1.5, 0.5, 0.0]).numpy()
    assert_close(found["auc"], torch.tensor([np.trapezoid(total, dx=0.25)], dtype=torch.float32))
    # at random each step takes a quarter on average: the straight line
    assert_close(found["chance_normalised"], torch.tensor([0.5]), atol=0.15, rtol=0)
    right = measured(Insertion(InputXGradient(), steps=4), model, td_of(input=torch.ones(3, 4)))
    assert found["normalised"] < found["chance_normalised"]
    assert right["normalised"] > right["chance_normalised"]


def test_where_nothing_changes_there_is_no_relative_area():
    model, x = nn.Linear(3, 1, bias=False), torch.randn(4, 3)
    x[1] = 0
    each = measured(Deletion(InputXGradient(), steps=3, reduction="none"), model, td_of(input=x))["normalised"]
    assert each.isnan().flatten().tolist() == [False, True, False, False]
    mean = measured(Deletion(InputXGradient(), steps=3), model, td_of(input=x))
    without = measured(Deletion(InputXGradient(), steps=3), model, td_of(input=x[[0, 2, 3]]))
    assert_close(mean["normalised"], without["normalised"])


def test_aopc_comprehensiveness_and_sufficiency_as_in_their_papers(given):
    model, x, base, td, of, attr = given
    whole = model(x)
    found = measured(Aopc(of, steps=4, units_per_step=2, reduction="none"), model, td)
    drops = [whole - one for one in curves(model, x, base, attr, [0, 2, 4, 6, 6], first=False).unbind(-1)]
    assert_close(found["aopc"], sum(drops) / 5, rtol=1e-4, atol=1e-5)
    counts = [1, 1, 2, 3]  # of 6: .06, .6, 1.2 and 3, rounded up
    for kind, name, first in ((Comprehensiveness, "comprehensiveness", False), (Sufficiency, "sufficiency", True)):
        found = measured(kind(of, bins=(0.01, 0.1, 0.2, 0.5), reduction="none"), model, td)
        expected = (whole[..., None] - curves(model, x, base, attr, counts, first)).mean(-1)
        assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
        assert_close(measured(kind(of, bins=[0.01, 0.1, 0.2, 0.5]), model, td)[name], expected.mean(0))


def test_pixels_are_replaced_with_all_their_channels():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).requires_grad_(False)
    x, of = torch.randn(2, 2, 4, 4), InputXGradient("output")
    attr = measured(of, model, td_of(input=x))["attr", "input"].sum(1).flatten(1)
    found = measured(Deletion(of, unit="pixel", steps=16, reduction="none"), model, td_of(input=x))["curve"]
    assert found.shape == (2, 17)
    for row, n in itertools.product(range(2), range(17)):
        left = x[row].clone().flatten(1)
        left[:, order_of(attr[row])[:n]] = 0
        assert_close(found[row, n], model(left.view(1, 2, 4, 4))[0, 0])
    with pytest.raises(SettingsError, match="unit='pixel' needs features of that kind"):
        measured(Deletion(Saliency(), unit="pixel"), mlp(3, 2), td_of(input=torch.randn(2, 3)))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(self.table(tokens).tanh().mean(1))


def test_tokens_by_their_embedding_or_as_they_are():
    model, tokens = Reads().requires_grad_(False), torch.randint(1, 7, (3, 5))
    of = InputXGradient(TARGETS, layers="table")
    attr = measured(of, model, td_of(input=tokens))["attr", "table"].sum(-1)
    found = measured(Deletion(of, unit="token", steps=5, reduction="none"), model, td_of(input=tokens))
    for row, target, n in itertools.product(range(3), range(2), range(6)):
        left = model.table(tokens[row]).clone()
        left[order_of(attr[row, target])[:n]] = 0
        assert_close(found["curve", "table"][row, target, n], model.head(left.tanh().mean(0))[target])

    td = TensorDict({"input": tokens, "baseline": {"input": torch.zeros_like(tokens)}}, [3])
    whole = measured(Deletion(FeatureAblation(TARGETS), steps=5, reduction="none"), model, td)
    assert_close(whole["curve"][..., 0], model(tokens))
    assert_close(whole["curve"][..., 5], model(torch.zeros_like(tokens)))


def test_groups_of_the_attribution_are_replaced_together():
    model, x = mlp(4, 8, 2).requires_grad_(False), torch.randn(3, 4)
    of = FeatureAblation(TARGETS, groups={"a": [0, 1, 2], "b": [3]})
    shares = measured(of, model, td_of(input=x))["shares"]
    found = measured(Deletion(of, steps=2, reduction="none"), model, td_of(input=x))["curve"]
    for row, target in itertools.product(range(3), range(2)):
        gone = [[0, 1, 2], [3]][int(shares[row, target].argmax())]
        left = [i for i in range(4) if i not in gone]
        expected = kept(model, x[row], torch.zeros(4), left, target)
        assert float(found[row, target, 1]) == pytest.approx(expected, abs=1e-6)


def test_what_is_masked_stays_and_does_not_count():
    model, x = nn.Linear(4, 1, bias=False).requires_grad_(False), torch.randn(3, 4)
    mask = torch.tensor([[True, True, False, True]]).expand(3, 4)
    td = TensorDict({"input": x, "mask": {"input": mask}}, [3])
    found = measured(Deletion(InputXGradient("output"), steps=3, reduction="none"), model, td)["curve"]
    shares = (x * model.weight)[:, [0, 1, 3]].sort(1, descending=True).values
    still = (x * model.weight)[:, 2]
    for n in range(4):
        assert_close(found[:, n], shares[:, n:].sum(1) + still)
    drawn = measured(Infidelity(Saliency("output")), model, td)
    assert drawn["infidelity"] < 1e-10


class Two(nn.Module):
    def forward(self, image, state):
        return torch.stack([image.flatten(1).sum(1) * 2 + state, state * 3], 1)


def test_several_inputs_of_different_ranks_are_ranked_together():
    image, state = torch.rand(3, 1, 2, 2), torch.full((3,), 10.0)
    td = td_of(image=image, state=state)
    deletion = Deletion(InputXGradient(), steps=5, reduction="none")
    for method in (deletion, Stability(Saliency()), Infidelity(Saliency()), MaxSensitivity(Saliency())):
        with method.prepare(Two(), ["image", "state"], ["output"]) as hooked:
            found = hooked(td)
        if isinstance(method, Deletion):  # the state first, of both
            assert_close(found["curve"][..., 1], torch.stack([2 * image.flatten(1).sum(1), torch.zeros(3)], 1))
        if isinstance(method, Infidelity):
            assert found["infidelity"].max() < 1e-8


METRICS = [
    Deletion(IntegratedGradients(TARGETS, points=4), steps=4, orders=2, reduction="none"),
    Aopc(IntegratedGradients(TARGETS, points=4, baseline="rows", references=3), orders=2, reduction="none"),
    Sufficiency(Saliency(TARGETS), baseline="zero", orders=2, reduction="none"),
    Infidelity(InputXGradient(TARGETS), unit="contribution", reduction="none"),
    MaxSensitivity(InputXGradient(TARGETS), reduction="none"),
]
every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)


@every_metric
def test_how_rows_are_cut_does_not_matter(metric):
    model, td = mlp(4, 8, 2), td_of(input=torch.randn(9, 4))
    whole = measured(metric, model, td)
    cut = measured(replace(metric, of=replace(metric.of, max_bytes=500)), model, td)  # 4 rows a pass
    for key in metric.writes:
        assert_close(cut[key], whole[key], rtol=1e-4, atol=1e-5)


@every_metric
def test_one_row_one_target_and_the_mean_of_rows(metric):
    model, td = mlp(4, 8, 2), td_of(input=torch.randn(6, 4))
    each = measured(metric, model, td)
    single = replace(metric, of=replace(metric.of, targets=("output", 1)))
    for key in metric.writes:
        assert_close(measured(single, model, td)[key], each[key][:, 1], rtol=1e-4, atol=1e-5)
        if key not in RELATIVES:
            assert_close(measured(replace(metric, reduction="mean"), model, td)[key], each[key].mean(0))
    if getattr(metric.of, "baseline", "zero") != "rows":  # which other rows there are matters to that alone
        for key in metric.writes:
            assert_close(measured(metric, model, td[:1])[key], each[key][:1], rtol=1e-4, atol=1e-5)


@every_metric
def test_by_a_layer_as_by_the_inputs_of_what_comes_after_it(metric):
    model, x = mlp(3, 8, 6, 2), torch.randn(5, 3)
    of = replace(metric.of, layers=["0", "1"])
    found = measured(replace(metric, of=of), model, td_of(input=x))
    for layer in (0, 1):
        after, value = nn.Sequential(*list(model)[layer + 1 :]), nn.Sequential(*list(model)[: layer + 1])(x).detach()
        expected = measured(metric, after, td_of(input=value))
        for key in metric.writes:
            assert_close(found[key, str(layer)], expected[key], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------- infidelity and sensitivity


@pytest.mark.parametrize("perturb", ["noise", "baseline"])
@pytest.mark.parametrize(("of", "unit"), [(Saliency(), "slope"), (InputXGradient(), "contribution")])
def test_the_gradient_of_a_linear_network_has_no_infidelity(of, unit, perturb):
    found = measured(Infidelity(of, unit=unit, perturb=perturb), nn.Linear(4, 2), td_of(input=torch.randn(5, 4)))
    assert found["infidelity"].max() < 1e-10
    assert found["null"].min() > 1e-3
    assert found["relative"].max() < 1e-8


def test_infidelity_of_a_square_in_closed_form():
    class Square(nn.Module):
        def forward(self, x):
            return x.square().sum(1, keepdim=True)

    # I·2x - (x² - (x - I)²) = I² for each feature; E (Σ I²)² = σ⁴ (n² + 2n) for n normal ones
    found = measured(Infidelity(Saliency(), samples=4000, noise=0.5), Square(), td_of(input=torch.randn(8, 3)))
    assert float(found["infidelity"]) == pytest.approx(0.5**4 * 15, rel=0.05)  # 32,000 draws


def test_the_largest_change_of_a_linear_attribution():
    model, x = nn.Linear(3, 2).requires_grad_(False), torch.randn(4, 3)
    still = measured(MaxSensitivity(Saliency()), model, td_of(input=x))
    assert_close(still["sensitivity"], torch.zeros(2))
    moved = measured(MaxSensitivity(InputXGradient(), samples=3000, reduction="none"), model, td_of(input=x))
    most = 0.02 * model.weight.norm(dim=1).expand(4, 2)  # at a corner, which 3000 draws come near
    assert (moved["sensitivity"] <= most * (1 + 1e-5)).all()
    assert_close(moved["sensitivity"], most, rtol=0.1, atol=0)
    assert_close(moved["relative"], moved["sensitivity"] / (x[:, None] * model.weight).norm(dim=2))


def test_an_attribution_that_draws_is_not_moved_by_what_it_draws():
    model = nn.Linear(3, 1)
    of = IntegratedGradients(baseline="rows", references=2, points=2)
    found = measured(MaxSensitivity(of, samples=20, reduction="none"), model, td_of(input=torch.randn(6, 3)))
    assert (found["sensitivity"] <= 0.02 * model.weight.norm() * (1 + 1e-3)).all()


def fixed(monkeypatch, drawn):
    """Let every row's draws be these."""
    monkeypatch.setattr(Problem, "drawn", lambda self, draw: drawn)


def test_the_infidelity_of_captum(monkeypatch):
    captum = pytest.importorskip("captum.metrics", reason=NO_CAPTUM)
    model, x, of = mlp(4, 8, 2), torch.randn(5, 4), Saliency(("output", 1))
    attr, noise = measured(of, model, td_of(input=x))["attr", "input"], torch.randn(5, 16, 4)
    fixed(monkeypatch, noise)
    found = measured(Infidelity(of, samples=16, noise=0.3, reduction="none"), model, td_of(input=x))
    moves = 0.3 * noise.flatten(0, 1)
    expected = captum.infidelity(model, lambda inputs: (moves, inputs - moves), x, attr, target=1, n_perturb_samples=16)
    assert_close(found["infidelity"], expected.detach(), atol=1e-5, rtol=1e-5)


def test_the_sensitivity_of_captum(monkeypatch):
    attribution = pytest.importorskip("captum.attr", reason=NO_CAPTUM)
    captum = pytest.importorskip("captum.metrics", reason=NO_CAPTUM)
    model, x, noise = mlp(4, 8, 2), torch.randn(5, 4), 2 * torch.rand(5, 10, 4) - 1
    fixed(monkeypatch, noise)
    method = MaxSensitivity(InputXGradient(("output", 1)), reduction="none")
    found = measured(method, model, td_of(input=x))
    explain = attribution.InputXGradient(model).attribute
    moves = 0.02 * noise.flatten(0, 1)
    expected = captum.sensitivity_max(
        explain, x, perturb_func=lambda inputs: (inputs + moves,), n_perturb_samples=10, target=1
    )
    assert_close(found["relative"], expected.detach(), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------- randomised layers


def test_layers_become_random_from_the_output_downwards():
    model, x = mlp(4, 16, 16, 2), torch.randn(12, 4)
    before = copy.deepcopy(model.state_dict())
    states = []

    class Watched(Saliency):
        def found(self, problem):
            states.append({k: v.clone() for k, v in problem.model.module.state_dict().items()})
            return super().found(problem)

    found = measured(CascadingRandomisation(Watched(TARGETS), reduction="none"), model, td_of(input=x))["spearman"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    changed = [{key.split(".")[0] for key, v in state.items() if not torch.equal(v, before[key])} for state in states]
    assert changed == [set(), {"4"}, {"2", "4"}, {"0", "2", "4"}]
    for place, state in enumerate(states[1:]):  # each against scipy, from the weights at that moment
        other = mlp(4, 16, 16, 2)
        other.load_state_dict(state)
        now, then = (measured(Saliency(TARGETS), one, td_of(input=x))["attr", "input"] for one in (other, model))
        for row, target in itertools.product(range(12), range(2)):
            expected = stats.spearmanr(now[row, target].abs(), then[row, target].abs()).statistic
            assert float(found[place, row, target]) == pytest.approx(expected)


class Odd(nn.Module):
    """Weights of its own, without a way to make them anew; and a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.weight, self.never = nn.Parameter(torch.randn(3, 4)), nn.Linear(2, 2)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        return self.body(x).tanh() @ self.weight.T


def test_weights_of_a_module_that_cannot_be_made_anew_are_put_in_another_order():
    model, x, seen = Odd(), torch.randn(6, 4), []

    class Watched(Saliency):
        def found(self, problem):
            seen.append(problem.model.module.weight.detach().clone())
            return super().found(problem)

    state = torch.get_rng_state()
    method = CascadingRandomisation(Watched())
    found = measured(method, model, td_of(input=x))["spearman"]
    labels = method.labels(Seen(td_of(input=x, output=model(x).detach())), HookedModel(model))
    assert labels["layer"] == ["Odd", "body.1", "body.0"]
    assert found.shape == (3, 3)
    assert not torch.equal(seen[1], seen[0])
    assert_close(seen[1].flatten().sort().values, seen[0].flatten().sort().values)
    assert torch.equal(torch.get_rng_state(), state)
    block = measured(CascadingRandomisation(Saliency(), layers="body"), model, td_of(input=x))["spearman"]
    assert block.shape == (1, 3)


def test_weights_made_anew_are_drawn_from_a_seed_and_nothing_else():
    one, other = nn.Linear(3, 4), nn.Linear(3, 4)
    state = torch.get_rng_state()
    for layer in (one, other):
        _randomise(layer, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(one.weight, other.weight)
    _randomise(other, 6)
    assert not torch.equal(one.weight, other.weight)


def test_what_an_attribution_draws_is_the_same_for_all_weights():
    seen = Seen(td_of(input=torch.zeros(4, 3)), generator=torch.Generator().manual_seed(3))
    again = repeatable(seen)
    one, other = again(), again()
    one.generator.manual_seed(0)  # what the first uses up, the second still has
    assert other.generator.initial_seed() == again().generator.initial_seed() != 0


def test_what_is_learnt_shows_and_what_is_not_does_not():
    model, x = mlp(6, 32, 1), torch.randn(64, 6)
    by_weights = measured(CascadingRandomisation(Saliency()), model, td_of(input=x))["spearman"]
    assert by_weights[-1].abs().max() < 0.6
    with pytest.raises(PathError, match="'9' matches no module of Sequential"):
        measured(CascadingRandomisation(Saliency(), layers="9"), model, td_of(input=x))
    with pytest.raises(PathError, match="'9' matches no module of Sequential"):
        measured(Deletion(Saliency(layers="9")), model, td_of(input=x))


# --------------------------------------------------------------------- over ticks


@pytest.fixture
def trained(tmp_path):
    """A run of a small training, and the deletion of every step by hand."""
    model, x = mlp(5, 8, 2), torch.randn(16, 5)
    td, of = td_of(input=x, y=x[:, :2].square()), Saliency(TARGETS)
    methods = {"attr": of, "stable": Stability(of, top=2), "deletion": Deletion(of, steps=5)}
    optimizer, by_hand = torch.optim.SGD(model.parameters(), 0.2), []
    into = ArtifactBuffer(tmp_path / "run")
    with Observer(methods, when=Every(optim_steps=2), into=into, on=ProbeSet(td)) as observer:
        for step in range(1, 7):
            optimizer.zero_grad()
            (model(x) - td["y"]).square().mean().backward()
            optimizer.step()
            observer.step(model, step=step)
            by_hand.append(measured(Deletion(of, steps=5, orders=1), model, td)["auc"])
    return ArtifactBuffer.open(tmp_path / "run"), by_hand


def test_deletion_is_tracked_through_a_training(trained):
    buffer, by_hand = trained
    deletion = buffer["deletion"]
    assert deletion.steps.tolist() == [2, 4, 6]
    assert_close(deletion.series("auc"), torch.stack(by_hand[1::2]))
    assert deletion.dims("curve") == ("target", "share")
    assert list(deletion.coords["share"]) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert list(deletion.coords["target"]) == ["output.0", "output.1"]


def test_stability_is_that_of_the_rows_of_a_run_less_chance(trained):
    buffer, _ = trained
    stable, shares = buffer["stable"], buffer["attr"].series(("attr", "input")).double()
    assert stable.series("reason").tolist() == [[1, 1], [0, 0], [0, 0]]
    assert stable.series("spearman")[0].isnan().all()
    orders = torch.tensor(list(itertools.permutations(range(5))))
    chance = torch.zeros(2, 2, dtype=torch.float64)
    for tick, row, target in itertools.product(range(2), range(16), range(2)):
        one, two = shares[tick, row, target], shares[tick + 1, row, target]
        chance[tick, target] += (two[orders] @ one).mean() / one.norm() / two.norm() / 16
    other = attribution_stability(buffer["attr"], ("attr", "input"), top=2)
    assert_close(stable.series("spearman")[1:], torch.tensor(other["spearman"].values))
    assert_close(stable.series("jaccard")[1:], torch.tensor(other["jaccard"].values))
    assert_close(stable.series("cosine")[1:], torch.tensor(other["cosine"].values) - chance)


def test_ticks_on_other_rows_are_not_compared_and_shares_of_one_size_have_no_ranking():
    model, x = mlp(4, 8, 2), torch.randn(3, 4)
    method = Stability(Saliency(("output", 0), layers=["0", "1"]), reduction="none")
    first = measured(method, model, td_of(input=x))
    again = measured(method, model, td_of(input=x), previous=first)
    assert_close(again["spearman", "1"], torch.ones(3, dtype=torch.float64))
    assert again["reason", "0"].tolist() == [0, 0, 0]
    other = measured(method, model, td_of(input=x + 1), previous=first)
    assert other["reason", "0"].tolist() == [1, 1, 1]
    assert other["jaccard", "0"].isnan().all()
    with torch.no_grad():
        model[2].weight.zero_()
    flat = measured(method, model, td_of(input=x), previous=first)
    assert flat["reason", "1"].tolist() == [2, 2, 2]
    assert flat["spearman", "1"].isnan().all()


def test_shares_drawn_at_random_have_no_stability_on_average():
    generator = torch.Generator().manual_seed(1)
    one, other = torch.rand(2, 4000, 12, generator=generator).double()
    assert float(cosine(one, other).mean()) > 0.7  # the floor of maps without signs
    assert float((cosine(one, other) - cosine_by_chance(one, other)).mean()) == pytest.approx(0, abs=0.005)


def test_an_attribution_without_a_share_of_each_feature_is_refused():
    class Short(Saliency):
        def found(self, problem):
            return {key: value[..., :1] for key, value in super().found(problem).items()}

    with pytest.raises(SettingsError, match=r"Deletion needs a share of each feature of 'input', \[2, 2, 3\]; Short"):
        measured(Deletion(Short()), mlp(3, 2), td_of(input=torch.randn(2, 3)))


def test_networks_of_the_attribution_are_those_of_the_metric():
    assert Deletion(Saliency(networks="actor")).networks == "actor"
    with pytest.raises(NetworkError, match="names no network"):
        measured(Deletion(Saliency(networks="actor")), mlp(3, 2), td_of(input=torch.randn(2, 3)))
