"""LogisticProbe against scikit-learn, and what it says where there is nothing to say."""

from contextlib import nullcontext as nothing

import numpy as np
import pytest
import torch
from method_cases import measured, mlp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from tensordict import TensorDict
from torch import nn

from tdhook_train import HookedModel, Seen
from tdhook_train.errors import GroupsError, TargetError
from tdhook_train.latent import LogisticProbe
from tdhook_train.method import Part
from tdhook_train.ops.folds import circular_shifts, fold_of

SCORES = ("balanced_accuracy", "auc", "log_loss")


def trajectories(n=160, length=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(n, 3, generator=g), 0.3 * torch.randn(n, generator=g)
    td = {"input": x, "sign": x[:, 0] * x[:, 1] + noise > 0, "three": 7 + (x[:, 2] > 0.4).int() + (x[:, 2] > -0.5)}
    return TensorDict(td, [n]), torch.arange(n) // length


def by_scikit_learn(x, y, folds):
    """Scores as the mean over folds, and of all rows held out."""
    x, y = x.detach().double().numpy(), y.numpy()
    each, every = [], np.empty((len(y), len(np.unique(y))))
    for k in range(int(folds.max()) + 1):
        train, held = (folds != k).numpy(), (folds == k).numpy()
        model = LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x[train], y[train])
        every[held] = model.predict_proba(x[held])
        each.append(scored(y[held], every[held], model.classes_))
    return np.mean(each, 0), scored(y, every, np.unique(y))


def scored(y, p, classes):
    auc = roc_auc_score(y, p[:, 1] if p.shape[1] == 2 else p, multi_class="ovr")
    return balanced_accuracy_score(y, classes[p.argmax(1)]), auc, log_loss(y, p, labels=classes)


def probed(td, groups, model=None, probe=None, **known):
    known = {"groups": groups, "ordered": True, "generator": torch.Generator().manual_seed(0)} | known
    return measured(probe or LogisticProbe(target="y", shifts=3), model or mlp(3, 6, 2), td, **known)


def of_all(out, kind=""):
    return torch.stack([out[score + kind] for score in SCORES])


def test_every_layer_and_target_scores_as_in_scikit_learn():
    td, groups = trajectories()
    model = mlp(3, 70, 5, 2)
    out = probed(td, groups, model, LogisticProbe(target=["sign", "three"], shifts=0))
    folds, values = fold_of(groups, 5), [td["input"]]
    for layer in model:
        values.append(layer(values[-1]))
    for j, target in enumerate(("sign", "three")):
        for i, value in enumerate(values[1:]):
            mean, pooled = by_scikit_learn(value, td[target], folds)
            assert of_all(out)[:, i, j].tolist() == pytest.approx(mean, abs=1e-9)
            assert of_all(out, "_pooled")[:, i, j].tolist() == pytest.approx(pooled, abs=1e-9)
        observed, _ = by_scikit_learn(td["input"], td[target], folds)
        assert of_all(out, "_observation")[:, :, j].T.tolist() == [pytest.approx(observed, abs=1e-9)] * 5
    assert of_all(out, "_initial").isnan().all()  # by hand there is no initial network
    assert not out["reason"].any()
    assert out["classes"].tolist() == [[2, 3]] * 5


def test_the_initial_network_is_probed_as_it_was():
    td, groups = trajectories()
    first, now = mlp(3, 6, 2), mlp(3, 6, 2)
    probe = LogisticProbe(target=["sign", "three"], shifts=0)
    out, expected = probed(td, groups, now, probe, initial=HookedModel(first)), probed(td, groups, first, probe)
    torch.testing.assert_close(of_all(out, "_initial"), of_all(expected))
    assert not torch.allclose(of_all(out), of_all(expected))


def test_targets_are_keys_features_functions_or_names_of_them_and_their_classes_are_labels():
    td, groups = trajectories()
    td["pair"] = torch.stack([td["three"], td["sign"].int()], 1)

    def large(batch):
        return batch["input"][:, 0].abs() > 1

    probe = LogisticProbe(target={"a": ("pair", 0), "b": large, "pair": "pair"}, shifts=0)
    model = mlp(3, 6, 2)
    out = probed(td, groups, model, probe)
    expected = probed(td, groups, model, LogisticProbe(target=["three", "sign"], shifts=0))
    torch.testing.assert_close(of_all(out)[..., [0, 2, 3]], of_all(expected)[..., [0, 0, 1]])
    hooked = HookedModel(model)
    hooked.trace(td)
    labels = probe.labels(Seen(td), hooked)
    assert labels["target"] == ["a", "b", "pair.0", "pair.1"]
    assert labels["target_classes"] == ["7, 8, 9", "False, True", "7, 8, 9", "0, 1"]


def test_a_boolean_matrix_is_a_multilabel_target_and_scores_as_scikit_learns_multilabel_estimators():
    td, groups = trajectories()
    td["labels"] = torch.stack([td["sign"], td["input"][:, 0] > 0.3, td["three"] == 8], 1)
    one = {"solver": "newton-cholesky", "tol": 1e-12, "max_iter": 1000}
    out = probed(td, groups, nn.Sequential(nn.Identity()), LogisticProbe(target="labels", shifts=0))
    x, y, folds = td["input"].double().numpy(), td["labels"].numpy(), fold_of(groups, 5).numpy()
    rest, each = [], []
    for k in range(5):
        train, held = folds != k, folds == k
        p = OneVsRestClassifier(LogisticRegression(**one)).fit(x[train], y[train]).predict_proba(x[held])
        many = MultiOutputClassifier(LogisticRegression(**one)).fit(x[train], y[train]).predict_proba(x[held])
        for found, scores in ((p.T, rest), ([q[:, 1] for q in many], each)):
            scores.append([scored(y[held, j], np.stack([1 - q, q], 1), np.array([0, 1])) for j, q in enumerate(found)])
    for scores in (rest, each):
        np.testing.assert_allclose(of_all(out)[:, 0].T.numpy(), np.mean(scores, 0), atol=1e-9)
    macro = np.mean([roc_auc_score(y[folds == k], p, average="macro") for k, p in _held_out(x, y, folds, one)])
    assert float(out["auc"].mean()) == pytest.approx(macro, abs=1e-9)


def _held_out(x, y, folds, settings):
    for k in range(5):
        model = OneVsRestClassifier(LogisticRegression(**settings)).fit(x[folds != k], y[folds != k])
        yield k, model.predict_proba(x[folds == k])


def test_what_is_no_class_is_refused():
    td, groups = trajectories()
    with pytest.raises(
        TargetError, match=r"target 'y' is torch.float32, .* or use a probe for quantities, such as RidgeProbe"
    ):
        probed(td.set("y", td["input"][:, 0]), groups)
    td["y"] = torch.arange(160) % 65
    with pytest.raises(TargetError, match="target 'y' has 65 classes, and LogisticProbe takes up to 64"):
        probed(td, groups)
    assert probed(td.set("y", torch.arange(160) % 64 % 40), groups)["classes"].unique().item() == 40
    with pytest.raises(GroupsError, match="needs a row for each of 5 folds, got 4 rows"):
        probed(td[:4], groups[:4])
    with pytest.raises(GroupsError, match="80 trajectory ids for 160 rows"):
        probed(td, groups[:80])


REASONS = {
    "one class": (lambda y, folds: torch.full_like(y, 3), 1),
    "one class in every fold": (lambda y, folds: folds, 2),
    "every fold lacks a class": (lambda y, folds: folds * 2 + y, 2),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_target_that_cannot_be_scored_says_why_and_leaves_the_others_alone(name):
    td, groups = trajectories()
    make, code = REASONS[name]
    td["y"] = make(td["sign"].long(), fold_of(groups, 5))
    model = mlp(3, 6, 2)
    out = probed(td, groups, model, LogisticProbe(target=["sign", "y"], shifts=3), initial=HookedModel(model))
    alone = probed(td, groups, model, LogisticProbe(target="sign", shifts=3), initial=HookedModel(model))
    assert out["reason"].tolist() == [[0, code]] * 3
    assert out["null_reason"].tolist() == [[0, 1]] * 3
    for kind in ("", "_pooled", "_observation", "_initial", "_null", "_p"):
        assert of_all(out, kind)[..., 1].isnan().all()
        torch.testing.assert_close(of_all(out, kind)[..., :1], of_all(alone, kind), rtol=1e-6, atol=1e-6)


def test_a_fold_whose_training_rows_lack_a_class_is_left_out_and_said():
    td, groups = trajectories()
    folds = fold_of(groups, 5)
    td["y"] = torch.where((folds == 2) & (td["input"][:, 1] > 0), 5, td["sign"].long())
    out = probed(td, groups, nn.Sequential(nn.Identity()))
    assert out["reason"].tolist() == [[7]]
    scores, x, y = [], td["input"].double().numpy(), td["y"].numpy()
    for k in (0, 1, 3, 4):
        train, held = (folds != k).numpy(), (folds == k).numpy()
        model = LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x[train], y[train])
        p = model.predict_proba(x[held])
        area = [roc_auc_score(y[held] == c, p[:, c]) for c in (0, 1)]  # of the classes held out
        with pytest.warns(UserWarning, match="y_pred contains classes") if p.argmax(1).max() == 2 else nothing():
            accuracy = balanced_accuracy_score(y[held], model.classes_[p.argmax(1)])
        scores.append((accuracy, np.mean(area), log_loss(y[held], p, labels=model.classes_)))
    assert of_all(out).flatten().tolist() == pytest.approx(np.mean(scores, 0), abs=1e-9)
    assert out["balanced_accuracy_null"].isfinite().all()


def test_one_trajectory_is_told_and_not_refused():
    td, groups = trajectories()
    out = probed(td, torch.zeros_like(groups), None, LogisticProbe(target=["sign", "three"]))
    assert out["reason"].tolist() == [[3, 3]] * 3
    assert out["null_reason"].tolist() == [[1, 1]] * 3
    for kind in ("", "_pooled", "_observation", "_initial", "_null", "_p"):
        assert of_all(out, kind).isnan().all()


def test_fewer_trajectories_than_folds_leave_one_out():
    td, _ = trajectories()
    groups = torch.arange(len(td)) // 60
    out = probed(td, groups, None, LogisticProbe(target="sign"))
    expected, _ = by_scikit_learn(td["input"], td["sign"], groups)
    assert of_all(out, "_observation")[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_layer_whose_activations_are_not_finite_says_so_and_leaves_the_others_alone(bad):
    class Breaks(nn.Module):
        def forward(self, x):
            return torch.where(torch.arange(len(x))[:, None] == 3, bad, x)

    td, groups = trajectories()
    whole, probe = mlp(3, 6, 2), LogisticProbe(target=["sign", "three"], shifts=3)
    out, alone = probed(td, groups, nn.Sequential(*whole[:2], Breaks()), probe), probed(td, groups, whole, probe)
    assert out["reason"].tolist() == [[0, 0], [0, 0], [4, 4]]
    assert out["null_reason"].tolist() == [[0, 0], [0, 0], [1, 1]]
    for kind in ("", "_null", "_p"):
        assert of_all(out, kind)[:, 2].isnan().all()
        torch.testing.assert_close(of_all(out, kind)[:, :2], of_all(alone, kind)[:, :2], rtol=1e-6, atol=1e-6)
    assert of_all(out, "_observation").isfinite().all()


def test_a_layer_that_does_not_vary_knows_nothing():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.full_like(x, 0.1)

    td, groups = trajectories()
    out = probed(td, groups, nn.Sequential(nn.Linear(3, 6), Constant()), LogisticProbe(target="sign"))
    assert not out["reason"].any()
    assert float(out["balanced_accuracy"][1, 0]) == pytest.approx(0.5)
    assert float(out["auc"][1, 0]) == pytest.approx(0.5)
    y, folds = td["sign"].double(), fold_of(groups, 5)
    losses = []
    for k in range(5):
        share, held = float(y[folds != k].mean()), float(y[folds == k].mean())
        losses.append(-held * np.log(share) - (1 - held) * np.log(1 - share))
    assert float(out["log_loss"][1, 0]) == pytest.approx(np.mean(losses), abs=1e-9)
    assert (out["balanced_accuracy_p"][1] == 1).all()  # ties count against it


def test_what_is_too_wide_to_solve_is_nan_with_its_reason_and_the_rest_is_scored():
    model = nn.Sequential(nn.Linear(3, 1400), nn.Linear(1400, 4), nn.Linear(4, 4096))
    td, groups = trajectories(40, 4)
    out = probed(td, groups, model, LogisticProbe(target=["sign", "three"], layers=("1", "2"), shifts=0))
    assert out["reason"].tolist() == [[0, 0], [5, 5]]
    out = probed(td, groups, model, LogisticProbe(target="three", layers=("0", "1"), shifts=0))
    assert out["reason"].tolist() == [[5], [0]]
    assert out["log_loss"].isfinite().tolist() == [[False], [True]]


@pytest.mark.parametrize(
    ("known", "shifts", "code"),
    [({"ordered": False}, 3, 2), ({"mixed": True}, 3, 2), ({"groups": None}, 3, 2), ({}, 0, 3), ({}, 3, 0)],
)
def test_why_there_is_no_null(known, shifts, code):
    td, groups = trajectories()
    groups = groups[torch.randperm(len(groups))] if "mixed" in known else known.get("groups", groups)
    known = {key: value for key, value in known.items() if key == "ordered"}
    out = probed(td, groups, None, LogisticProbe(target="sign", shifts=shifts), **known)
    assert out["null_reason"].flatten().tolist() == [code] * 3
    assert of_all(out).isfinite().all()
    for kind in ("_null", "_p"):
        assert (of_all(out, kind).isnan() == (code != 0)).all()


def test_the_null_is_the_best_of_19_and_p_counts_the_score_itself():
    td, groups = trajectories()
    td["y"] = torch.randint(2, (len(td),), generator=torch.Generator().manual_seed(3))
    model = mlp(3, 6, 2)
    out = probed(td, groups, model, LogisticProbe(target="y"), generator=torch.Generator().manual_seed(5))
    shifts = circular_shifts(groups, 19, torch.Generator().manual_seed(5))
    value = model[0](td["input"])
    scores = np.array([by_scikit_learn(value, td["y"][s], fold_of(groups, 5))[0] for s in shifts])
    assert float(out["auc_null"][0, 0]) == pytest.approx(scores[:, 1].max(), abs=5e-3)
    assert float(out["log_loss_null"][0, 0]) == pytest.approx(scores[:, 2].min(), abs=1e-3)
    for i, beaten in ((1, scores[:, 1] >= float(out["auc"][0, 0])), (2, scores[:, 2] <= float(out["log_loss"][0, 0]))):
        assert float(out[SCORES[i] + "_p"][0, 0]) == pytest.approx((1 + beaten.sum()) / 20, abs=0.051)
    assert 0 < (scores[:, 2] <= float(out["log_loss"][0, 0])).sum() < 19


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_the_null_is_calibrated_on_autocorrelated_trajectories_that_know_nothing_of_the_layer(classes):
    g, tests, rejected = torch.Generator().manual_seed(0), 200, torch.zeros(3)
    length, many = 30, 10
    groups = torch.arange(many).repeat_interleave(length)
    probe = LogisticProbe(layers="", target="y")

    def ar1(width):
        noise = torch.randn(many, length, width, generator=g)
        for t in range(1, length):
            noise[:, t] += 0.9 * noise[:, t - 1]
        return noise.flatten(0, 1)

    hooked = HookedModel(nn.Identity())
    for _ in range(tests):
        y = ar1(1)[:, 0]
        td = TensorDict({"input": ar1(3), "y": (y > 0).long() + (y > 1) * (classes > 2)}, [many * length])
        hooked.trace(td)
        seen = Seen(td, {"": td["input"]}, groups=groups, ordered=True, generator=g)
        rejected += of_all(probe.measure(seen, hooked), "_p")[:, 0, 0] <= 0.05
    assert ((rejected >= 0.01 * tests) & (rejected <= 0.12 * tests)).all(), rejected


def test_two_networks_together_are_each_alone():
    td, groups = trajectories()
    models = {"actor": mlp(3, 6, 2), "critic": mlp(3, 70, 1)}  # of widths that are solved in different batches
    probe = LogisticProbe(target=["sign", "three"], shifts=3)

    def part(name):
        hooked = HookedModel(models[name], name=name)
        hooked.trace(td)
        sites = hooked.sites("**")
        with hooked.run(td) as run:
            values = {site: run.get(site) for site in sites}
        values = {site: value.resolve() for site, value in values.items()}
        generator = torch.Generator().manual_seed(0)
        return Part(Seen(td, values, groups=groups, ordered=True, generator=generator), hooked)

    both = probe.across({name: part(name) for name in models})
    assert both.labels["layer"] == ["actor.0", "actor.1", "actor.2", "critic.0", "critic.1", "critic.2"]
    assert both.labels["target_classes"] == ["False, True", "7, 8, 9"]
    for i, name in enumerate(models):
        alone = probe.across({name: part(name)})
        for key, value in alone.values.items():
            close = {"rtol": 1e-3, "atol": 2e-2} if key.endswith("_null") else {"rtol": 1e-6, "atol": 1e-7}
            if not key.endswith("_p"):
                torch.testing.assert_close(both.values[key][3 * i : 3 * i + 3], value, equal_nan=True, **close)


def test_what_is_remembered_between_ticks_never_changes_a_result():
    td, groups = trajectories()
    model, memo, probe = mlp(3, 6, 2), {}, LogisticProbe(target="y", shifts=3)
    initial = HookedModel(mlp(3, 6, 2))
    for y in ("sign", "sign", "three"):  # the target too may change
        td["y"] = td[y].long()
        known = probed(td, groups, model, probe, memo=memo, initial=initial)
        anew = probed(td, groups, model, probe, initial=initial)
        assert memo
        for key in LogisticProbe.writes.keys() - {"direction", "intercept"}:  # which were not asked for
            assert torch.equal(known[key], anew[key])
