"""Directions between two sides: scikit-learn, closed forms, rows held out, sides that cannot be told apart."""

import numpy as np
import pytest
import torch
from method_cases import above_zero, batch, measured, mlp
from scipy import stats
from sklearn.decomposition import FastICA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train import ArtifactBuffer, At, Observer, ProbeSet
from tdhook_train.errors import GroupsError, SettingsError
from tdhook_train.latent import Cav, GradientDirection, IcaDirection, LogisticDirection, MeanDifferenceDirection
from tdhook_train.metrics import direction_cosine
from tdhook_train.ops.folds import fold_of

LEARNT = (MeanDifferenceDirection, LogisticDirection, GradientDirection, Cav)  # from the labels
each = pytest.mark.parametrize("kind", [*LEARNT, IcaDirection])
FASTER = {"GradientDirection": {"steps": 50}, "Cav": {"nulls": 2}}
each_learnt = pytest.mark.parametrize("kind", LEARNT)


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def normalised(direction):
    direction = torch.as_tensor(direction, dtype=torch.float64)
    return direction / direction.norm()


def mean_difference(x, marks):
    return normalised(x[marks].mean(0) - x[~marks].mean(0))


def logistic(x, marks):
    fit = LogisticRegression(C=0.5, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x, marks)
    return normalised(fit.coef_[0])


def fisher(x, marks):
    """Linear discriminant analysis with a shrunk covariance: (1 - α) S + α mean(diag S) 1, by its eigenvectors."""
    fit = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.1 / 1.1).fit(x, marks)
    return normalised(fit.coef_[0])


REFERENCES = {
    "MeanDifferenceDirection": (mean_difference, {}),
    "LogisticDirection": (logistic, {"C": 0.5}),
    "GradientDirection": (fisher, {"ridge": 0.1}),
    "Cav": (logistic, {"C": 0.5}),
}


@each_learnt
def test_the_direction_and_its_scores_on_rows_held_out(kind):
    """Slowly: fold by fold, from the other rows alone, scored by scikit-learn."""
    model, td = mlp(3, 6, 5, 2).double(), batch(60).double()
    td["traj"] = torch.arange(60) // 4
    reference, settings = REFERENCES[kind.__name__]
    found = measured(kind(("0", "1"), above_zero, 4, **settings), model, td, groups=td["traj"])
    folds, marks, tol = fold_of(td["traj"], 4), above_zero(td), 1e-3 if kind is GradientDirection else 1e-7
    for i, site in enumerate("01"):
        h = model[: i + 1](td["input"]).detach()
        assert_close(found["direction", site], reference(h, marks), atol=tol, rtol=0)
        place = torch.zeros(60, dtype=torch.float64)
        for fold in range(4):
            train, held = folds != fold, folds == fold
            u = reference(h[train], marks[train])
            middle = (h[train & marks].mean(0) + h[train & ~marks].mean(0)) @ u / 2
            place[held] = h[held] @ u - middle
        assert_close(found["auc"][i].item(), roc_auc_score(marks, place))
        assert_close(found["accuracy"][i].item(), balanced_accuracy_score(marks, place > 0))
        within = (len(place[marks]) - 1) * place[marks].var() + (len(place[~marks]) - 1) * place[~marks].var()
        d = (place[marks].mean() - place[~marks].mean()) / (within / 58).sqrt()
        assert_close(found["separation"][i], d, atol=10 * tol, rtol=0)
    assert found["reason"].tolist() == [0, 0]


@each
def test_a_contrast_is_the_labelled_rows_of_both_its_sides(kind):
    """Both versions of a row lie in one fold, so the labelled rows are given as trajectories of two."""
    model, td = mlp(3, 6, 5, 2), batch(30)
    rows = td_of(input=torch.cat([td["positive", "input"], td["negative", "input"]]), label=torch.arange(60) < 30)
    settings = {"layers": ("1", "2"), "folds": 3} | FASTER.get(kind.__name__, {})
    by_label = measured(kind(concept="label", **settings), model, rows, groups=torch.arange(30).repeat(2))
    by_contrast = measured(kind(**settings), model, td)
    for key in (("direction", "1"), ("direction", "2"), "separation", "accuracy", "auc", "reason"):
        assert_close(by_contrast[key], by_label[key])
    of_a_grid = measured(kind(**settings), model, td.reshape(5, 6))
    assert_close(of_a_grid["direction", "2"], by_contrast["direction", "2"])
    only = td.select("positive", "negative")
    assert_close(measured(kind(**settings), model, only)["auc"], by_contrast["auc"])


@each_learnt
def test_a_planted_direction_is_found_and_a_label_that_means_nothing_scores_as_chance(kind):
    g = torch.Generator().manual_seed(1)
    u, marks = normalised(torch.randn(20, generator=g)), torch.rand(400, generator=g) > 0.3
    x = torch.randn(400, 20, generator=g).double() + 4 * marks[:, None] * u
    settings = {"C": 0.01} if kind in (LogisticDirection, Cav) else {}
    found = measured(kind("", "label", **settings), nn.Identity(), td_of(input=x, label=marks))
    assert found["direction", ""] @ u > 0.95
    assert found["auc"] > 0.99
    assert abs(found["separation"].item() - 4) < 0.5  # the sides lie 4 apart along u, with a spread of 1
    chance = measured(kind("", "label"), nn.Identity(), td_of(input=x, label=torch.rand(400, generator=g) > 0.5))
    assert abs(chance["auc"].item() - 0.5) < 0.1
    assert abs(chance["accuracy"].item() - 0.5) < 0.1
    assert abs(chance["separation"].item()) < 0.3


@each_learnt
def test_more_units_than_rows_never_score_themselves(kind):
    """Noise in 300 units tells any 40 rows apart; rows held out do not follow."""
    g = torch.Generator().manual_seed(2)
    td = td_of(input=torch.randn(40, 300, generator=g), label=torch.arange(40) % 2 > 0)
    found = measured(kind("", "label"), nn.Identity(), td)
    place = td["input"].double() @ found["direction", ""].double()
    assert roc_auc_score(td["label"], place) == 1
    assert 0.2 < found["auc"].item() < 0.8


def test_the_normal_in_more_units_than_rows_is_scikit_learns():
    g = torch.Generator().manual_seed(2)
    td = td_of(input=torch.randn(30, 70, generator=g).double(), label=torch.arange(30) % 3 > 0)
    found = measured(LogisticDirection("", "label", C=0.5), nn.Identity(), td)
    assert_close(found["direction", ""], logistic(td["input"], td["label"]), atol=1e-7, rtol=0)


@each
def test_positions_are_averaged_and_channels_are_units(kind):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh())
    td = td_of(input=torch.randn(24, 2, 6, 6), label=torch.rand(24) > 0.5)
    found = measured(kind("1", "label"), model, td)
    means = model(td["input"]).detach().mean((2, 3))
    flat = measured(kind("", "label"), nn.Identity(), td_of(input=means, label=td["label"]))
    assert_close(found["direction", "1"], flat["direction", ""])
    assert_close(found["auc"], flat["auc"])


@each
@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda td: td.set("label", torch.zeros(20, dtype=torch.bool)), 1),
        (lambda td: td.set("label", torch.ones(20, dtype=torch.bool)), 1),
        (lambda td: td["input"].__setitem__((3, 1), torch.nan), 2),
        (lambda td: td["input"].__setitem__((3, 1), torch.inf), 2),
        (lambda td: td["input"].fill_(0.1), 3),
    ],
)
def test_what_cannot_be_found_is_nan_with_a_reason(kind, change, code):
    td = td_of(input=torch.randn(20, 4), label=torch.arange(20) % 2 > 0)
    change(td)
    found = measured(kind("", "label"), nn.Identity(), td)
    assert found["reason"].tolist() == [code]
    assert found["direction", ""].isnan().all()
    for key in ("separation", "accuracy", "auc"):
        assert found[key].isnan().all()
    assert code in kind.legend["reason"]


@each
def test_what_is_found_but_cannot_be_scored_says_so(kind):
    td = td_of(input=torch.randn(20, 4), label=torch.arange(20) < 10)
    one = measured(kind("", "label"), nn.Identity(), td, groups=torch.zeros(20).long())
    halves = measured(kind("", "label"), nn.Identity(), td, groups=torch.arange(20) // 10)  # a side each
    for found, code in ((one, 4), (halves, 5)):
        assert found["reason"].tolist() == [code]
        assert abs(found["direction", ""].norm().item() - 1) < 1e-6
        assert found["auc"].isnan().all()


@each
def test_units_that_say_nothing_get_no_part(kind):
    x = torch.randn(40, 3)
    x[:, 1], x[:, 2] = 0.1, x[:, 0]
    found = measured(kind("", "label"), nn.Identity(), td_of(input=x, label=x[:, 0] > 0))["direction", ""]
    assert_close(found, torch.tensor([0.5**0.5, 0, 0.5**0.5]).double(), atol=1e-6, rtol=0)  # of the twins, half each


@each
def test_an_observer_records_directions_that_are_compared_over_steps(kind, tmp_path):
    model, td = mlp(3, 5, 2), batch(30)
    settings = {"folds": 2} | FASTER.get(kind.__name__, {})
    methods = {"labelled": kind(nn.Linear, above_zero, **settings), "contrast": kind(nn.Linear, **settings)}
    with Observer(methods, when=At(0, 1, 2), into=tmp_path, on=ProbeSet(td, groups="rows")) as observer:
        observer.step(model, step=0)
        observer.step(model, step=1)
        model[0].weight.data.neg_()
        observer.step(model, step=2)
    for name, method in methods.items():
        rows = ArtifactBuffer.open(tmp_path)[name]
        model_now = measured(method, model, td)
        if kind is not IcaDirection:  # whose search begins elsewhere by hand
            assert_close(rows.series(("direction", "2"))[2], model_now["direction", "2"])
        assert rows.coords["layer"] == ["0", "2"]
        angles = direction_cosine(rows, ("direction", "0")).values
        assert angles.shape == (3, 3)
        if kind is not IcaDirection:  # where activations are Gaussian there are several optima
            np.testing.assert_allclose(angles[0, 1], 1, atol=1e-5)
        if kind is MeanDifferenceDirection:
            np.testing.assert_allclose(angles[0, 2], -1, atol=1e-6)  # the layer was turned round


def test_what_has_no_rows_is_refused():
    td = TensorDict({"positive": {"input": torch.ones(2, 3)}, "negative": {"input": torch.zeros(2, 3)}}, [])
    with pytest.raises(SettingsError, match=r"needs rows of both sides, but the TensorDict has batch_size=\[\]"):
        measured(MeanDifferenceDirection("0"), mlp(3, 5, 2), td)
    with pytest.raises(GroupsError, match="3 trajectory ids for 24 rows"):
        measured(MeanDifferenceDirection("0", above_zero), mlp(3, 5, 2), batch(), groups=torch.arange(3))

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Embedding(7, 3)

        def forward(self, x):
            return x + self.inner(torch.arange(5)).mean(0)

    with pytest.raises(GroupsError, match=r"'inner' gives \(5, 3\) for rows \[24\]; name layers with one row a sample"):
        measured(MeanDifferenceDirection("inner", above_zero), Table(), batch())


def mixed(rows=1500):
    """Four independent sources, none of them Gaussian, mixed; the label is about one of them."""
    g = np.random.default_rng(0)
    sources = np.stack([g.uniform(-1, 1, rows), g.laplace(size=rows), g.exponential(size=rows), g.uniform(size=rows)])
    mixing = np.linalg.qr(g.normal(size=(4, 4)))[0] + 0.3 * g.normal(size=(4, 4))
    label = torch.as_tensor(sources[1] + 0.3 * g.normal(size=rows) > 0)
    return td_of(input=torch.as_tensor((mixing @ sources).T), label=label), mixing


def test_the_component_is_the_planted_source_and_scikit_learns():
    td, mixing = mixed()
    found = measured(IcaDirection("", "label"), nn.Identity(), td)
    assert found["reason"].tolist() == [0]
    source = td["input"].numpy() @ np.linalg.inv(mixing)[1]
    assert np.corrcoef(td["input"] @ found["direction", ""], source)[0, 1] > 0.998
    ica = FastICA(whiten="unit-variance", random_state=3).fit(td["input"].numpy())  # from another start
    values, marks = ica.transform(td["input"].numpy()), td["label"].numpy()
    t = stats.ttest_ind(values[marks], values[~marks]).statistic
    best = abs(t).argmax()
    assert_close(found["direction", ""], normalised(ica.components_[best] * np.sign(t[best])), atol=1e-2, rtol=0)
    flipped = measured(IcaDirection("", lambda td: ~td["label"]), nn.Identity(), td)
    assert_close(flipped["direction", ""], -found["direction", ""])


def test_components_that_a_layer_does_not_use_are_none():
    td, _ = mixed()
    wide = td_of(input=(td["input"] @ torch.randn(4, 9).double()).float(), label=td["label"])
    narrow, found = (measured(IcaDirection("", "label"), nn.Identity(), one) for one in (td, wide))
    assert_close(found["auc"], narrow["auc"], atol=1e-3, rtol=0)
    one = measured(IcaDirection("", "label", components=1), nn.Identity(), td)["direction", ""]
    principal = torch.linalg.svd(td["input"] - td["input"].mean(0)).Vh[0]
    assert_close(abs(one @ principal).item(), 1.0)


def test_a_search_that_did_not_converge_says_so():
    td, _ = mixed(400)
    found = measured(IcaDirection("", "label", max_steps=1), nn.Identity(), td)
    early = measured(GradientDirection("", "label", steps=3), nn.Identity(), td)
    for one in (found, early):
        assert one["reason"].tolist() == [6]
        assert one["auc"].isfinite().all()


def test_an_ascent_that_ends_early_stays_near_the_difference_of_the_means():
    td, _ = mixed(400)
    means = measured(MeanDifferenceDirection("", "label"), nn.Identity(), td)["direction", ""]
    angles = [
        (measured(GradientDirection("", "label", steps=steps), nn.Identity(), td)["direction", ""] @ means).item()
        for steps in (1, 5, 300)
    ]
    assert angles == sorted(angles, reverse=True)
    assert angles[0] > 0.95


def test_sides_without_any_spread_lie_without_end_apart():
    marks = torch.arange(20) % 2 > 0
    x = torch.where(marks[:, None], torch.tensor([3.0, 4.0]), torch.zeros(2))
    found = measured(GradientDirection("", "label"), nn.Identity(), td_of(input=x, label=marks))
    assert_close(found["direction", ""], torch.tensor([0.6, 0.8]).double(), atol=1e-5, rtol=0)
    assert found["auc"] == 1
