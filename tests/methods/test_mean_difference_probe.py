"""MeanDifferenceProbe against scikit-learn's nearest centroid, and in closed form."""

import numpy as np
import pytest
import torch
from method_cases import measured, mlp
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.neighbors import NearestCentroid
from tensordict import TensorDict
from torch import nn

from tdhook_train import HookedModel, Seen
from tdhook_train.errors import TargetError
from tdhook_train.latent import MeanDifferenceProbe
from tdhook_train.ops.folds import circular_shifts, fold_of

SCORES = ("balanced_accuracy", "auc")


def trajectories(n=160, length=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(n, 3, generator=g), 0.3 * torch.randn(n, generator=g)
    td = {"input": x, "sign": x[:, 0] * x[:, 1] + noise > 0, "three": 7 + (x[:, 2] > 0.4).int() + (x[:, 2] > -0.5)}
    return TensorDict(td, [n]), torch.arange(n) // length


def nearness(centroids, x):
    """By how much the mean of each class is nearer than the nearest other: half the difference of the squares."""
    squares = ((x[:, None] - centroids) ** 2).sum(-1)
    others = [np.delete(squares, k, 1).min(1) for k in range(len(centroids))]
    return (np.stack(others, 1) - squares) / 2


def scores(y, predicted, near):
    classes = np.unique(y)
    areas = [roc_auc_score(y == c, near[:, c]) for c in (classes if near.shape[1] > 2 else [1])]
    return balanced_accuracy_score(y, predicted), np.mean(areas)


def by_scikit_learn(x, y, folds):
    """Scores as the mean over folds, and of all rows held out."""
    x, y = x.detach().double().numpy(), y.unique(return_inverse=True)[1].numpy()
    each, predicted, near = [], np.empty(len(y)), np.empty((len(y), len(np.unique(y))))
    for k in range(int(folds.max()) + 1):
        train, held = (folds != k).numpy(), (folds == k).numpy()
        model = NearestCentroid().fit(x[train], y[train])
        predicted[held], near[held] = model.predict(x[held]), nearness(model.centroids_, x[held])
        each.append(scores(y[held], predicted[held], near[held]))
    return np.mean(each, 0), scores(y, predicted, near)


def probed(td, groups, model=None, probe=None, **known):
    known = {"groups": groups, "ordered": True, "generator": torch.Generator().manual_seed(0)} | known
    return measured(probe or MeanDifferenceProbe(target="sign"), model or mlp(3, 6, 2), td, **known)


def of_all(out, kind=""):
    return torch.stack([out[score + kind] for score in SCORES])


def test_every_layer_and_target_scores_as_nearest_centroid_does():
    td, groups = trajectories()
    model, folds = mlp(3, 70, 5), fold_of(groups, 5)
    out = probed(td, groups, model, MeanDifferenceProbe(target=["sign", "three"], shifts=3))
    values = [td["input"]]
    for layer in model:
        values.append(layer(values[-1]))
    for j, target in enumerate(("sign", "three")):
        observed, _ = by_scikit_learn(td["input"], td[target], folds)
        for i, value in enumerate(values[1:]):
            mean, pooled = by_scikit_learn(value, td[target], folds)
            assert of_all(out)[:, i, j].tolist() == pytest.approx(mean, abs=1e-12)
            assert of_all(out, "_pooled")[:, i, j].tolist() == pytest.approx(pooled, abs=1e-12)
            assert of_all(out, "_observation")[:, i, j].tolist() == pytest.approx(observed, abs=1e-12)
    assert of_all(out, "_initial").isnan().all()  # by hand there is no initial network
    assert out["classes"].tolist() == [[2, 3]] * 3
    assert not out["reason"].any()
    assert not out["null_reason"].any()


def test_far_from_zero_it_scores_the_same():
    td, groups = trajectories()
    out = probed(td, groups, nn.Sequential(nn.Identity()), MeanDifferenceProbe(target=["sign", "three"]))
    td["input"] = td["input"].double() + 1e6
    far = probed(td, groups, nn.Sequential(nn.Identity()), MeanDifferenceProbe(target=["sign", "three"]))
    torch.testing.assert_close(of_all(far), of_all(out), rtol=0, atol=0)


def test_the_initial_network_is_probed_as_it_was():
    td, groups = trajectories()
    first, now = mlp(3, 6, 2), mlp(3, 6, 2)
    out = probed(td, groups, now, initial=HookedModel(first))
    torch.testing.assert_close(of_all(out, "_initial"), of_all(probed(td, groups, first)))
    assert not torch.allclose(of_all(out, "_initial"), of_all(out))


def test_the_direction_is_the_difference_of_the_means_of_all_rows():
    td, groups = trajectories()
    model = mlp(3, 6, 2)
    out = probed(td, groups, model, MeanDifferenceProbe(target=["sign", "three"], directions=True))
    hidden = model[0](td["input"]).detach().double().numpy()
    yes = td["sign"].numpy()
    assert out["direction"].shape == (3, 2, 6)
    assert out["direction"][0, 0].numpy() == pytest.approx(hidden[yes].mean(0) - hidden[~yes].mean(0), abs=1e-12)
    assert out["direction"][2, 0].isnan().tolist() == [False] * 2 + [True] * 4
    assert out["direction"][:, 1].isnan().all()  # three means have no one difference
    assert "direction" not in probed(td, groups)


def test_two_clouds_are_told_apart_halfway_between_them():
    # means 2.25 and 10, whatever is held out: halfway is 6.125, though four rows of five are of the first class
    x, y = torch.tensor([0.0, 0.0, 0.0, 9.0, 10.0] * 8), torch.tensor([0, 0, 0, 0, 1] * 8)
    td, groups = TensorDict({"input": x[:, None], "y": y}, [40]), torch.arange(8).repeat_interleave(5)
    out = probed(td, groups, nn.Sequential(nn.Identity()), MeanDifferenceProbe(target="y", directions=True))
    assert float(out["balanced_accuracy"]) == (3 / 4 + 1) / 2
    assert float(out["auc"]) == 1
    assert float(out["direction"]) == 7.75


def test_units_that_vary_together_are_beyond_it():
    # the classes differ along the first unit less than noise shared by both units, which a linear fit subtracts
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (400,), generator=g)
    noise = 10 * torch.randn(400, generator=g)
    x = torch.stack([y + noise, noise], 1)
    td = TensorDict({"input": x, "y": y}, [400])
    out = probed(td, torch.arange(400) // 10, nn.Sequential(nn.Identity()), MeanDifferenceProbe(target="y"))
    assert float(out["balanced_accuracy"]) < 0.65


@pytest.mark.parametrize("shifts", [1, 6])
def test_the_null_is_what_shifts_reach_and_p_counts_the_score_itself(shifts):
    td, groups = trajectories()
    model, folds = mlp(3, 6, 2), fold_of(groups, 5)
    probe = MeanDifferenceProbe(target=["sign", "three"], shifts=shifts)
    out = probed(td, groups, model, probe, generator=torch.Generator().manual_seed(5))
    turned = circular_shifts(groups, shifts, torch.Generator().manual_seed(5))
    value = model[0](td["input"])
    for j, name in enumerate(("sign", "three")):
        found = np.array([by_scikit_learn(value, td[name][s], folds)[0] for s in turned])
        assert of_all(out, "_null")[:, 0, j].tolist() == pytest.approx(found.max(0), abs=1e-12)
        beaten = (found >= of_all(out)[:, 0, j].numpy() - 1e-12).sum(0)
        assert of_all(out, "_p")[:, 0, j].tolist() == pytest.approx((1 + beaten) / (shifts + 1))


def test_quantities_and_too_many_classes_are_refused():
    td, groups = trajectories()
    td["quantity"], td["many"] = torch.randn(160), torch.arange(160)
    with pytest.raises(TargetError, match=r"target 'quantity' is torch.float32, and MeanDifferenceProbe tells classes"):
        probed(td, groups, None, MeanDifferenceProbe(target="quantity"))
    with pytest.raises(TargetError, match="target 'many' has 160 classes, and MeanDifferenceProbe takes up to 64"):
        probed(td, groups, None, MeanDifferenceProbe(target="many"))


def test_a_fold_whose_training_rows_lack_a_class_is_left_out_and_said():
    td, groups = trajectories()
    folds = fold_of(groups, 5)
    td["y"] = torch.where((folds == 2) & (td["input"][:, 1] > 0), 5, td["sign"].long())
    out = probed(td, groups, nn.Sequential(nn.Identity()), MeanDifferenceProbe(target=["y", "sign"]))
    assert out["reason"].tolist() == [[7, 0]]
    x, y = td["input"].double().numpy(), td["y"].numpy()
    each = []
    for k in (0, 1, 3, 4):
        train, held = (folds != k).numpy(), (folds == k).numpy()
        found = NearestCentroid().fit(x[train], y[train]).predict(x[held])
        each.append(np.mean([(found == y[held])[y[held] == c].mean() for c in (0, 1)]))
    assert float(out["balanced_accuracy"][0, 0]) == pytest.approx(np.mean(each), abs=1e-12)


def test_labels_name_the_classes():
    td, _ = trajectories()
    hooked = HookedModel(mlp(3, 6, 2))
    hooked.trace(td)
    probe = MeanDifferenceProbe(target=["sign", "three"])
    labels = probe.labels(Seen(td), hooked)
    assert labels["target"] == ["sign", "three"]
    assert labels["target_classes"] == ["False, True", "7, 8, 9"]
    assert labels["layer"] == ["0", "1", "2"]
