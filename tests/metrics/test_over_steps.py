"""Comparisons over steps, against the formulas written slowly and scipy's own."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge
from tensordict import TensorDict
from torch import nn

from tdhook_train import ArtifactBuffer, At, Every, Observer, ProbeSet
from tdhook_train.errors import KeyMissingError, SettingsError
from tdhook_train.latent import ActivationCache, RidgeProbe
from tdhook_train.metrics import attribution_stability, churn, direction_cosine, layer_similarity


def unbiased_hsic(k, m):
    """Song et al. 2012, eq. 5, sum by sum over the kernels."""
    n = len(k)
    k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
    one = torch.ones(n, dtype=k.dtype)
    sums = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return torch.trace(k @ m) + sums - 2 / (n - 2) * (one @ k @ m @ one)


def cka(x, y):
    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    return float(unbiased_hsic(k, m) / (unbiased_hsic(k, k) * unbiased_hsic(m, m)).sqrt())


def held(tmp_path, rows, dims, coords=None, data=None):
    """An artifact of rows by step."""
    buffer = ArtifactBuffer(tmp_path / "r")
    buffer.declare("a", dims=dims, coords=coords)
    for i, (step, row) in enumerate(rows):
        buffer.append("a", row, step=step, data=0 if data is None else data[i])
    return buffer["a"]


@pytest.fixture
def trained(tmp_path):
    """A run of a network whose weights change, and its activations kept by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(40, 3)
    td = TensorDict(input=x, y=x[:, 0] + 0.1 * torch.randn(40), z=x[:, 1], batch_size=[40])
    kept = []
    methods = {"acts": ActivationCache(), "probe": RidgeProbe(target=["y", "z"], shifts=0, directions=True)}
    buffer = ArtifactBuffer(tmp_path / "run")
    with Observer(methods, when=At(0) | Every(optim_steps=1), into=buffer, on=ProbeSet(td, groups="rows")) as observer:
        for step in range(4):
            observer.step(model, step=step)
            hidden = model[0](x)
            kept.append([hidden, hidden.tanh(), model(x)])
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.5 * torch.randn_like(p)
    return ArtifactBuffer.open(tmp_path / "run"), [[v.detach() for v in row] for row in kept], td


def test_similarity_is_debiased_cka_of_the_activations_of_each_pair_of_steps(trained):
    buffer, kept, _ = trained
    found = layer_similarity(buffer["acts"])
    assert found.dims == ("layer", "step", "other")
    assert found["layer"].values.tolist() == ["0", "1", "2"]
    for layer, (i, j) in itertools.product(range(3), itertools.product(range(4), repeat=2)):
        assert float(found[layer, i, j]) == pytest.approx(cka(kept[i][layer], kept[j][layer]), abs=1e-6)
    np.testing.assert_allclose(np.diagonal(found.values, axis1=1, axis2=2), 1)


def test_steps_on_other_data_are_not_compared(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [(s, {("activation", "l"): torch.randn(9, 3, generator=generator)}) for s in range(3)]
    found = layer_similarity(held(tmp_path, rows, {("activation", "l"): ("batch", "unit")}, data=[5, 5, 6])).values[0]
    assert np.isnan(found).tolist() == [[False, False, True], [False, False, True], [True, True, False]]


def test_of_several_rows_of_a_step_the_last_counts(tmp_path):
    values = [torch.randn(9, 2) for _ in range(3)]
    rows = [(0, {"o": values[0]}), (1, {"o": values[1]}), (1, {"o": values[2]})]
    found = churn(held(tmp_path, rows, {"o": ("batch", "class")}), "o")
    assert found["step"].values.tolist() == [1]
    assert float(found["moved"][0]) == pytest.approx(float((values[2] - values[0]).abs().mean()))


def test_directions_are_the_ridge_regression_of_all_rows_at_the_best_penalty(trained):
    buffer, kept, td = trained
    probe = buffer["probe"]
    directions, alphas = probe.series("direction"), probe.series("alpha")
    assert probe.dims("direction") == ("layer", "target", "unit")
    for step, layer, (t, target) in itertools.product(range(4), range(3), enumerate(("y", "z"))):
        x = kept[step][layer].double().numpy()
        expected = Ridge(alpha=float(alphas[step, layer, t])).fit(x, td[target].double().numpy()).coef_
        np.testing.assert_allclose(directions[step, layer, t, : x.shape[1]], expected, rtol=1e-4, atol=1e-6)
        assert directions[step, layer, t, x.shape[1] :].isnan().all()


def test_direction_cosine_is_that_of_each_pair_of_steps(trained):
    buffer, _, _ = trained
    found = direction_cosine(buffer["probe"])
    assert found.dims == ("layer", "target", "step", "other")
    assert found["target"].values.tolist() == ["y", "z"]
    directions = buffer["probe"].series("direction")[:, 2, 1, :2]
    for i, j in itertools.product(range(4), repeat=2):
        expected = torch.nn.functional.cosine_similarity(directions[i], directions[j], 0)
        assert float(found.sel(layer="2", target="z")[i, j]) == pytest.approx(float(expected))


def test_a_direction_that_was_not_fitted_has_no_cosine(tmp_path):
    rows = [(0, {"direction": torch.full((1, 1, 2), torch.nan)}), (1, {"direction": torch.ones(1, 1, 2)})]
    found = direction_cosine(held(tmp_path, rows, {"direction": ("layer", "target", "unit")})).values[0, 0]
    assert np.isnan(found).tolist() == [[True, True], [True, False]]


def chance(n, k):
    """The mean over all pairs of sets, counted."""
    sets = [set(one) for one in itertools.combinations(range(n), k)]
    return np.mean([len(a & b) / len(a | b) for a in sets for b in sets])


def test_stability_is_scipys_spearman_the_cosine_and_jaccard_less_chance(tmp_path):
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(5, 2, 6, generator=generator).round(decimals=1) for _ in range(3)]  # with ties
    rows = [(10 * s, {("attr", "x"): value}) for s, value in enumerate(values)]
    artifact = held(tmp_path, rows, {("attr", "x"): ("batch", "target", "feature")}, {"target": ["a", "b"]})
    found = attribution_stability(artifact, ("attr", "x"), top=2)
    assert found["step"].values.tolist() == [10, 20]
    for s, (t, name) in itertools.product(range(2), enumerate("ab")):
        pairs = [(values[s][b, t].numpy(), values[s + 1][b, t].numpy()) for b in range(5)]
        spearman = np.mean([stats.spearmanr(abs(one), abs(two)).statistic for one, two in pairs])
        cosine = np.mean([one @ two / np.linalg.norm(one) / np.linalg.norm(two) for one, two in pairs])
        tops = [[set(sorted(range(6), key=lambda i, v=v: (-abs(v[i]), i))[:2]) for v in pair] for pair in pairs]
        jaccard = np.mean([len(a & b) / len(a | b) for a, b in tops]) - chance(6, 2)
        at = found.sel(target=name).isel(step=s)
        assert float(at["spearman"]) == pytest.approx(spearman)
        assert float(at["cosine"]) == pytest.approx(cosine, abs=1e-6)
        assert float(at["jaccard"]) == pytest.approx(jaccard)


def test_what_does_not_change_is_stable_and_its_opposite_has_the_opposite_sign(tmp_path):
    value = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0]])  # nothing is said of the second sample
    rows = [(0, {"attr": value}), (1, {"attr": value}), (2, {"attr": -value})]
    found = attribution_stability(held(tmp_path, rows, {"attr": ("batch", "feature")}), "attr", top=1)
    np.testing.assert_allclose(found["cosine"], [1, -1], rtol=1e-6)
    np.testing.assert_allclose(found["spearman"], [1, 1], rtol=1e-6)
    np.testing.assert_allclose(found["jaccard"], [1 - chance(4, 1)] * 2, rtol=1e-6)


def test_all_features_share_no_more_than_chance(tmp_path):
    rows = [(s, {"attr": torch.randn(4, 3)}) for s in range(2)]
    found = attribution_stability(held(tmp_path, rows, {"attr": ("batch", "feature")}), "attr", top=10)
    assert float(found["jaccard"][0]) == pytest.approx(0)


def test_churn_counts_changed_choices_and_their_divergence(trained):
    buffer, kept, _ = trained
    found = churn(buffer["acts"], ("activation", "2"))
    assert found["step"].values.tolist() == [1, 2, 3]
    for s in range(3):
        a, b = kept[s][2].double().numpy(), kept[s + 1][2].double().numpy()
        p, q = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (a, b))
        assert float(found["changed"][s]) == (a.argmax(1) != b.argmax(1)).mean()
        assert float(found["kl"][s]) == pytest.approx(np.mean([stats.entropy(one, two) for one, two in zip(p, q)]))  # noqa: B905
        assert float(found["moved"][s]) == pytest.approx(abs(a - b).mean())
    assert found["changed"].values.max() > 0
    assert list(churn(buffer["acts"], "activation.2", outputs="values")) == ["moved"]


def test_neighbours_on_other_data_are_not_compared(tmp_path):
    rows = [(s, {"o": torch.randn(4, 2)}) for s in range(3)]
    found = churn(held(tmp_path, rows, {"o": ("batch", "class")}, data=[1, 1, 2]), "o")
    assert np.isnan(found["changed"]).values.tolist() == [False, True]


def test_what_cannot_be_compared_is_refused(tmp_path, trained):
    buffer, _, _ = trained
    with pytest.raises(KeyMissingError, match="needs activations"):
        layer_similarity(buffer["probe"])
    with pytest.raises(KeyMissingError, match="did you mean 'alpha'"):
        direction_cosine(buffer["probe"], "alpah")
    with pytest.raises(SettingsError, match="needs 2 steps"):
        churn(held(tmp_path, [(0, {"o": torch.ones(2, 2)})], {"o": ("batch", "class")}), "o")
    with pytest.raises(SettingsError, match="neither"):
        churn(buffer["acts"], ("activation", "2"), outputs="classes")
    with pytest.raises(SettingsError, match="top of 1"):
        attribution_stability(buffer["acts"], ("activation", "2"), top=0)
    with pytest.raises(SettingsError, match="samples, targets and features"):
        attribution_stability(buffer["probe"], "r2")
    both = ArtifactBuffer.merge({"a": buffer.path, "b": buffer.path}, tmp_path / "both", progress=False)
    with pytest.raises(SettingsError, match="of one run"):
        layer_similarity(both["acts"])
