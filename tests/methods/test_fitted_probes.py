"""What probes write to be applied elsewhere, against scikit-learn fitted to all rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import measured, mlp
from sklearn.linear_model import LogisticRegression, Ridge
from tensordict import TensorDict
from torch import nn

from tdhook_train import ArtifactBuffer, At, Every, Observer, ProbeSet
from tdhook_train.latent import LogisticProbe, RidgeProbe
from tdhook_train.metrics import direction_cosine


def rows(n=120):
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(n, 3, generator=g) + 2, torch.randn(n, generator=g)
    td = {"input": x, "y": x[:, 0] + noise, "z": 3 * x[:, 1] - 0.5 * noise}
    td |= {"sign": x[:, 0] + noise > 2, "three": 4 + (x[:, 2] > 2.4).long() + (x[:, 2] + noise > 1.5)}
    td["one"] = torch.full((n,), 9)
    return TensorDict(td, [n])


def activations(model, x):
    out = []
    for layer in model:
        x = layer(x).detach()
        out.append(x)
    return out


def test_ridge_directions_and_intercepts_are_those_of_a_fit_to_all_rows_at_the_best_penalty():
    td, model = rows(), mlp(3, 70, 5, 2)
    out = measured(RidgeProbe(target=["y", "z"], alphas=(0.1, 10.0), shifts=0, directions=True), model, td)
    assert out["direction"].shape == (5, 2, 70)
    for i, x in enumerate(activations(model, td["input"])):
        for j, target in enumerate(("y", "z")):
            fit = Ridge(alpha=float(out["alpha"][i, j])).fit(x.double().numpy(), td[target].double().numpy())
            width = x.shape[1]
            np.testing.assert_allclose(out["direction"][i, j, :width], fit.coef_, atol=1e-8)
            assert float(out["intercept"][i, j]) == pytest.approx(fit.intercept_, abs=1e-8)
            assert out["direction"][i, j, width:].isnan().all()


@pytest.fixture(scope="module")
def logistic():
    torch.manual_seed(0)
    td, model = rows(), mlp(3, 70, 5, 2)
    out = measured(LogisticProbe(target=["sign", "three", "one"], shifts=0, directions=True), model, td)
    return td, activations(model, td["input"]), out


def test_logistic_directions_and_intercepts_are_those_of_a_fit_to_all_rows(logistic):
    td, values, out = logistic
    assert out["direction"].shape == (5, 3, 3, 70)
    for i, x in enumerate(values):
        for j, target in enumerate(("sign", "three")):
            model = LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000)
            fit, width, classes = model.fit(x.double().numpy(), td[target].numpy()), x.shape[1], 2 + j
            weights, intercepts = fit.coef_, fit.intercept_ - (fit.intercept_.mean() if j else 0)
            if not j:  # the first of two classes is 0
                weights, intercepts = np.stack([0 * weights[0], weights[0]]), np.array([0, *intercepts])
            np.testing.assert_allclose(out["direction"][i, j, :classes, :width], weights, atol=1e-7)
            np.testing.assert_allclose(out["intercept"][i, j, :classes], intercepts, atol=1e-7)
            assert out["direction"][i, j, classes:].isnan().all()
            assert out["direction"][i, j, :, width:].isnan().all()
            assert out["intercept"][i, j, classes:].isnan().all()


def test_a_softmax_over_what_is_written_gives_the_probabilities_whatever_the_number_of_classes(logistic):
    td, values, out = logistic
    x = values[2].double()
    logits = x @ out["direction"][2, :, :, : x.shape[1]].mT + out["intercept"][2, :, None]
    for j, target in enumerate(("sign", "three")):
        model = LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000)
        p = model.fit(x.numpy(), td[target].numpy()).predict_proba(x.numpy())
        np.testing.assert_allclose(logits[j, :, : 2 + j].softmax(-1), p, atol=1e-7)


def test_what_has_no_score_has_no_direction(logistic):
    _, _, out = logistic
    assert out["reason"][:, 2].tolist() == [1] * 5
    assert out["direction"][:, 2].isnan().all()
    assert out["intercept"][:, 2].isnan().all()


def test_asking_for_directions_changes_no_score(logistic):
    td, _, out = logistic
    torch.manual_seed(0)
    alone = measured(LogisticProbe(target=["sign", "three", "one"], shifts=0), mlp(3, 70, 5, 2), td)
    assert "direction" not in set(alone.keys())
    for key in LogisticProbe.shown:
        torch.testing.assert_close(alone[key], out[key], equal_nan=True, rtol=1e-9, atol=1e-9)


def test_one_trajectory_and_values_that_are_not_finite_give_no_direction():
    td, model = rows(), mlp(3, 6, 2)
    probe = LogisticProbe(target=["sign", "three"], shifts=0, directions=True)
    out = measured(probe, model, td, groups=torch.zeros(len(td)))
    assert out["direction"].shape == (3, 2, 3, 6)
    assert out["direction"].isnan().all()
    with torch.no_grad():
        model[2].bias[0] = torch.inf
    for one in (probe, RidgeProbe(target="y", shifts=0, directions=True)):
        out = measured(one, model, td)
        assert out["direction"][2].isnan().all()
        assert out["intercept"][2].isnan().all()
        assert out["intercept"][:2].isfinite().any(-1).all()
        alone = measured(replace(one, layers="2"), model, td)["direction"]
        assert alone.shape[-1] == 2  # rows of a run have one shape, whatever breaks


@pytest.mark.parametrize("target", ["sign", "three"])
def test_logistic_directions_are_compared_over_steps(tmp_path, target):
    td, model, kept = rows(), nn.Sequential(nn.Linear(3, 4), nn.Tanh()), []
    methods = {"probe": LogisticProbe(target=target, shifts=0, directions=True)}
    buffer = ArtifactBuffer(tmp_path / "run")
    with Observer(methods, when=At(0) | Every(optim_steps=1), into=buffer, on=ProbeSet(td, groups="rows")) as observer:
        for step in range(3):
            observer.step(model, step=step)
            kept.append(model(td["input"]).detach().double().numpy())
            with torch.no_grad():
                model[0].weight += 0.5 * torch.randn(4, 3)
    found = direction_cosine(ArtifactBuffer.open(tmp_path / "run")["probe"])
    assert found.dims == ("layer", "target", "class", "step", "other")
    fits = [LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(x, td[target].numpy()).coef_ for x in kept]
    for i, j in ((0, 1), (2, 0)):
        a, b = fits[i][-1], fits[j][-1]  # of the last class
        assert float(found[1, 0, -1, i, j]) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    assert np.isnan(found.values[1, 0, 0]).all() == (target == "sign")  # the first of two classes has no direction
