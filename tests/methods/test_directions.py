"""Directions between two sides: scikit-learn, closed forms, rows held out, sides that cannot be told apart."""

import numpy as np
import pytest
import torch
from method_cases import above_zero, batch, measured, mlp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train import ArtifactBuffer, At, Observer, ProbeSet
from tdhook_train.errors import GroupsError, SettingsError
from tdhook_train.latent import LogisticDirection, MeanDifferenceDirection
from tdhook_train.metrics import direction_cosine
from tdhook_train.ops.folds import fold_of

EACH = (MeanDifferenceDirection, LogisticDirection)
each = pytest.mark.parametrize("kind", EACH)


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


REFERENCES = {"MeanDifferenceDirection": (mean_difference, {}), "LogisticDirection": (logistic, {"C": 0.5})}


@each
def test_the_direction_and_its_scores_on_rows_held_out(kind):
    """Slowly: fold by fold, from the other rows alone, scored by scikit-learn."""
    model, td = mlp(3, 6, 5, 2).double(), batch(60).double()
    td["traj"] = torch.arange(60) // 4
    reference, settings = REFERENCES[kind.__name__]
    found = measured(kind(("0", "1"), above_zero, 4, **settings), model, td, groups=td["traj"])
    folds, marks = fold_of(td["traj"], 4), above_zero(td)
    for i, site in enumerate("01"):
        h = model[: i + 1](td["input"]).detach()
        assert_close(found["direction", site], reference(h, marks), atol=1e-7, rtol=0)
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
        assert_close(found["separation"][i], d, atol=1e-6, rtol=1e-6)
    assert found["reason"].tolist() == [0, 0]


@each
def test_a_contrast_is_the_labelled_rows_of_both_its_sides(kind):
    """Both versions of a row lie in one fold, so the labelled rows are given as trajectories of two."""
    model, td = mlp(3, 6, 5, 2), batch(30)
    rows = td_of(input=torch.cat([td["positive", "input"], td["negative", "input"]]), label=torch.arange(60) < 30)
    by_label = measured(kind(("1", "2"), "label"), model, rows, groups=torch.arange(30).repeat(2))
    by_contrast = measured(kind(("1", "2")), model, td)
    for key in (("direction", "1"), ("direction", "2"), "separation", "accuracy", "auc", "reason"):
        assert_close(by_contrast[key], by_label[key])
    of_a_grid = measured(kind(("1", "2")), model, td.reshape(5, 6))
    assert_close(of_a_grid["direction", "2"], by_contrast["direction", "2"])
    only = td.select("positive", "negative")
    assert_close(measured(kind(("1", "2")), model, only)["auc"], by_contrast["auc"])


@each
def test_a_planted_direction_is_found_and_a_label_that_means_nothing_scores_as_chance(kind):
    g = torch.Generator().manual_seed(1)
    u, marks = normalised(torch.randn(20, generator=g)), torch.rand(400, generator=g) > 0.3
    x = torch.randn(400, 20, generator=g).double() + 4 * marks[:, None] * u
    found = measured(
        kind("", "label", C=0.01) if kind is LogisticDirection else kind("", "label"),
        nn.Identity(),
        td_of(input=x, label=marks),
    )
    assert found["direction", ""] @ u > 0.95
    assert found["auc"] > 0.99
    assert abs(found["separation"].item() - 4) < 0.5  # the sides lie 4 apart along u, with a spread of 1
    chance = measured(kind("", "label"), nn.Identity(), td_of(input=x, label=torch.rand(400, generator=g) > 0.5))
    assert abs(chance["auc"].item() - 0.5) < 0.1
    assert abs(chance["accuracy"].item() - 0.5) < 0.1
    assert abs(chance["separation"].item()) < 0.3


@each
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
    model, td = mlp(3, 6, 5, 2), batch(30)
    methods = {"labelled": kind(nn.Linear, above_zero), "contrast": kind(nn.Linear)}
    with Observer(methods, when=At(0, 1, 2), into=tmp_path, on=ProbeSet(td, groups="rows")) as observer:
        observer.step(model, step=0)
        observer.step(model, step=1)
        model[0].weight.data.neg_()
        observer.step(model, step=2)
    for name, method in methods.items():
        rows = ArtifactBuffer.open(tmp_path)[name]
        model_now = measured(method, model, td)
        assert_close(rows.series(("direction", "2"))[2], model_now["direction", "2"])
        assert rows.coords["layer"] == ["0", "2", "4"]
        angles = direction_cosine(rows, ("direction", "0")).values
        assert angles.shape == (3, 3)
        np.testing.assert_allclose(angles[0, 1], 1, atol=1e-6)
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
