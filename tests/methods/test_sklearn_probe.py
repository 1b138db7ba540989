"""SklearnProbe against scikit-learn's own cross-validation, and what it does with other people's estimators."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import measured, mlp
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.cluster import KMeans
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.model_selection import GridSearchCV, PredefinedSplit, cross_val_predict, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from tensordict import TensorDict
from torch import nn

from tdhook_train import HookedModel
from tdhook_train.errors import SettingsError, UserCodeError
from tdhook_train.latent import RidgeProbe, SklearnProbe
from tdhook_train.ops.folds import circular_shifts, fold_of

CLASSES = {"balanced_accuracy": "balanced_accuracy", "auc": "roc_auc", "log_loss": "neg_log_loss"}


def trajectories(n=96, length=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(n, 3, generator=g), 0.3 * torch.randn(n, generator=g)
    td = {"input": x, "sign": x[:, 0] + noise > 0, "three": 7 + (x[:, 2] > 0.4).int() + (x[:, 2] > -0.5)}
    return TensorDict(td | {"product": x[:, 0] * x[:, 1] + noise, "linear": x[:, 2] + 1}, [n]), torch.arange(
        n
    ) // length


def probed(td, groups, estimator, model=None, **settings):
    known = {"groups": groups, "ordered": True, "generator": torch.Generator().manual_seed(0)}
    known |= {key: settings.pop(key) for key in ("initial", "generator", "memo") if key in settings}
    return measured(SklearnProbe(estimator=estimator, **settings), model or mlp(3, 6, 2), td, **known)


def by_scikit_learn(estimator, x, y, folds, scoring):
    x, y = x.detach().double().numpy(), y.numpy()
    return cross_val_score(estimator, x, y, cv=PredefinedSplit(folds.numpy()), scoring=scoring)


def values_of(model, td):
    values = [td["input"]]
    for layer in model:
        values.append(layer(values[-1]))
    return values


REGRESSORS = {
    "ridge": Ridge(alpha=2.0),
    "pipeline": make_pipeline(StandardScaler(), Ridge()),
    "tree": DecisionTreeRegressor(max_depth=3, random_state=0),
    "search": GridSearchCV(Ridge(), {"alpha": [0.1, 10.0]}, cv=2),
}


@pytest.mark.parametrize("name", REGRESSORS)
def test_regressors_score_as_under_cross_validation(name):
    td, groups = trajectories()
    model, folds, estimator = mlp(3, 6, 2), fold_of(groups, 5), REGRESSORS[name]
    out = probed(td, groups, estimator, model, target=["product", "linear"])
    observation, *values = values_of(model, td)
    for j, target in enumerate(("product", "linear")):
        observed = by_scikit_learn(estimator, observation, td[target].double(), folds, "r2").mean()
        assert out["r2_observation"][:, j].tolist() == pytest.approx([observed] * 3, abs=1e-10)
        for i, value in enumerate(values):
            found = by_scikit_learn(estimator, value, td[target].double(), folds, "r2")
            assert float(out["r2"][i, j]) == pytest.approx(found.mean(), abs=1e-10)
    x, y = values[0].detach().double().numpy(), td["product"].double().numpy()
    predicted = cross_val_predict(estimator, x, y, cv=PredefinedSplit(folds.numpy()))
    assert float(out["r2_pooled"][0, 0]) == pytest.approx(1 - ((y - predicted) ** 2).mean() / y.var(), abs=1e-10)
    assert not hasattr(estimator, "n_features_in_")  # what was given stays unfitted
    assert set(out["null_reason"].flatten().tolist()) == {3}  # no shifts by default


CLASSIFIERS = {
    "logistic": (LogisticRegression(), set()),
    "bayes": (GaussianNB(), set()),  # ranks by its probabilities
    "tree": (DecisionTreeClassifier(max_depth=2, random_state=0), set()),  # with ties, and certain of wrong classes
    "svc": (SVC(), {"log_loss"}),
    "linear svc": (LinearSVC(random_state=0), {"log_loss"}),
    "pipeline": (make_pipeline(StandardScaler(), LogisticRegression()), set()),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_score_as_under_cross_validation(name):
    td, groups = trajectories()
    model, folds = mlp(3, 6, 2), fold_of(groups, 4)
    estimator, missing = CLASSIFIERS[name]
    out = probed(td, groups, estimator, model, target="sign", folds=4)
    _, *values = values_of(model, td)
    for score, scoring in CLASSES.items():
        for i in (0, 2):
            if score in missing:
                assert float(out[score][i, 0]) != float(out[score][i, 0])
                continue
            found = by_scikit_learn(estimator, values[i], td["sign"].long(), folds, scoring).mean()
            assert float(out[score][i, 0]) == pytest.approx(-found if score == "log_loss" else found, abs=1e-10)
    assert out["classes"].tolist() == [[2]] * 3
    assert not out["reason"].any()


@pytest.mark.parametrize("name", ["logistic", "bayes", "tree"])
def test_several_classes_score_as_under_cross_validation(name):
    td, groups = trajectories()
    model, folds, estimator = mlp(3, 6), fold_of(groups, 4), CLASSIFIERS[name][0]
    out = probed(td, groups, estimator, model, target="three", folds=4)
    for score, scoring in (CLASSES | {"auc": "roc_auc_ovr"}).items():
        found = by_scikit_learn(estimator, model(td["input"]), td["three"] - 7, folds, scoring).mean()
        assert float(out[score]) == pytest.approx(-found if score == "log_loss" else found, abs=1e-10)


def test_decisions_of_one_class_against_one_rank_no_classes():
    td, groups = trajectories()
    for shape, known in (("ovo", False), ("ovr", True)):
        td["four"] = td["three"] + (td["input"][:, 1] > 0)
        out = probed(td, groups, SVC(decision_function_shape=shape), target="four", folds=3)
        assert out["balanced_accuracy"].isfinite().all()
        assert out["auc"].isfinite().all() == known


def test_the_null_is_what_shifts_reach():
    td, groups = trajectories()
    model, folds = mlp(3, 6), fold_of(groups, 5)
    td["y"] = torch.randn(96, generator=torch.Generator().manual_seed(3))
    for estimator, target, scoring, keys in (
        (Ridge(), "y", "r2", ("r2", "r2_null", "p")),
        (GaussianNB(), "sign", "neg_log_loss", ("log_loss", "log_loss_null", "log_loss_p")),
    ):
        out = probed(td, groups, estimator, model, target=target, shifts=4, generator=torch.Generator().manual_seed(5))
        turned = circular_shifts(groups, 4, torch.Generator().manual_seed(5))
        y = td[target].double() if target == "y" else td[target].long()
        found = [by_scikit_learn(estimator, model(td["input"]), y[s], folds, scoring).mean() for s in turned]
        sign = -1 if scoring == "neg_log_loss" else 1
        assert float(out[keys[1]]) == pytest.approx(sign * max(found), abs=1e-10)
        assert float(out[keys[2]]) == (1 + sum(score >= sign * float(out[keys[0]]) for score in found)) / 5


def test_the_initial_network_is_probed_as_it_was():
    td, groups = trajectories()
    first, now = mlp(3, 6, 2), mlp(3, 6, 2)
    out = probed(td, groups, Ridge(), now, target="product", initial=HookedModel(first))
    torch.testing.assert_close(out["r2_initial"], probed(td, groups, Ridge(), first, target="product")["r2"])


def test_settings_compare_by_the_class_and_the_parameters_of_the_estimator():
    nested = make_pipeline(FunctionTransformer(np.tanh), SGDClassifier(alpha=0.5))
    one = SklearnProbe(estimator=nested)
    nested.set_params(sgdclassifier__alpha=0.25)  # what was measured with stays what it was
    other = SklearnProbe(estimator=nested)
    same = SklearnProbe(estimator=make_pipeline(FunctionTransformer(np.tanh), SGDClassifier(alpha=0.5)))
    assert one == same == pickle.loads(pickle.dumps(one)) == replace(one)
    assert hash(one) == hash(same)
    assert one != other
    assert SklearnProbe(estimator=Ridge()) != SklearnProbe(estimator=RandomForestRegressor())
    assert "alpha=0.5" in one.settings()["estimator"]
    assert "numpy.tanh" in one.settings()["estimator"] or "tanh" in one.settings()["estimator"]
    assert all(not name.startswith("_") for name in one.settings())
    assert one.estimator.get_params()["sgdclassifier__alpha"] == 0.5


class Draws(RegressorMixin, BaseEstimator):
    """Draws from NumPy's and torch's global states, as estimators without a random state do."""

    def fit(self, x, y):
        self.guess_ = np.random.rand() + float(torch.rand(()))
        return self

    def predict(self, x):
        return np.full(len(x), self.guess_)


class DrawsAnew(Draws):
    """Draws from a generator of its own: from the machine's entropy where no random state is given."""

    def __init__(self, random_state=None):
        self.random_state = random_state

    def fit(self, x, y):
        self.guess_ = np.random.default_rng(self.random_state).random()
        return self


OF_CHANCE = [Draws(), make_pipeline(StandardScaler(), DrawsAnew()), RandomForestRegressor(2)]


@pytest.mark.parametrize("estimator", OF_CHANCE)
def test_random_fits_come_from_the_generator_and_leave_global_states_alone(estimator):
    td, groups = trajectories()
    model, initial = mlp(3, 6, 2), HookedModel(mlp(3, 6, 2))
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()

    def of(seed, memo):
        generator = torch.Generator().manual_seed(seed)
        return probed(td, groups, estimator, model, target="linear", generator=generator, initial=initial, memo=memo)

    memo = {}
    one, same, other = of(1, memo), of(1, {}), of(2, memo)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert torch.equal(one["r2"], same["r2"])
    assert not torch.equal(one["r2"], other["r2"])
    for key in ("r2_observation", "r2_initial"):  # the same whenever they are computed
        assert torch.equal(one[key], other[key])
        assert torch.equal(other[key], of(2, {})[key])


def test_a_given_random_state_is_kept():
    td, groups = trajectories()
    forest = RandomForestRegressor(2, random_state=3)
    out = probed(td, groups, forest, mlp(3, 6), target="linear", generator=torch.Generator().manual_seed(9))
    again = probed(td, groups, forest, mlp(3, 6), target="linear", generator=torch.Generator().manual_seed(8))
    assert torch.equal(out["r2_observation"], again["r2_observation"])


class Picky(ClassifierMixin, BaseEstimator):
    """Fails on rows of two features."""

    def fit(self, x, y):
        if x.shape[1] == 2:
            raise ValueError("no two features")
        self.classes_ = np.unique(y)
        return self

    def predict(self, x):
        return np.zeros(len(x), dtype=int)


def test_an_estimator_that_fails_names_the_layer():
    td, groups = trajectories()
    with pytest.raises(UserCodeError, match=r"SklearnProbe: Picky failed on layer '2': ValueError: no two features"):
        probed(td, groups, Picky(), target="sign")
    td["input"] = td["input"][:, :2]
    with pytest.raises(UserCodeError, match=r"failed on the raw input: ValueError"):
        probed(td, groups, Picky(), nn.Sequential(nn.Linear(2, 3)), target="sign")


def test_only_balanced_accuracy_where_there_is_nothing_to_rank_by():
    td, groups = trajectories()
    out = probed(td, groups, Picky(), mlp(3, 4), target="sign", shifts=2)
    assert float(out["balanced_accuracy"]) == 0.5
    for key in ("auc", "log_loss", "auc_null", "auc_p", "log_loss_null"):
        assert out[key].isnan().all()


def test_what_is_no_estimator_is_refused():
    with pytest.raises(SettingsError, match=r"needs an estimator, such as estimator=Ridge\(\), got None"):
        SklearnProbe()
    with pytest.raises(SettingsError, match=r"needs a regressor or a classifier, and KMeans\(\) is neither"):
        SklearnProbe(estimator=KMeans())


def test_ridge_scores_as_ridge_probe_does():
    td, groups = trajectories()
    model, targets = mlp(3, 6, 2), ["product", "linear", "partly"]
    td["partly"] = torch.where(fold_of(groups, 5) == 2, 0.1, td["linear"])  # no share of variance to explain there
    out = probed(td, groups, Ridge(alpha=3.0), model, target=targets)
    known = {"groups": groups, "ordered": True}
    ridge = measured(RidgeProbe(target=targets, alphas=(3.0,), shifts=0), model, td, **known)
    assert out["reason"].tolist() == [[0, 0, 7]] * 3
    for key in ("r2", "r2_pooled", "r2_observation"):
        torch.testing.assert_close(out[key], ridge[key], rtol=0, atol=1e-9)
