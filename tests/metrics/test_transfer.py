"""Probes of one step on the activations of another, against scikit-learn fitted and applied pair by pair."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score
from tensordict import TensorDict
from torch import nn

from tdhook_train import ArtifactBuffer, At, Every, HookedModel, Observer, ProbeSet, Seen
from tdhook_train.errors import GroupsError, KeyMissingError, SettingsError
from tdhook_train.latent import LogisticProbe, ProbeTransfer, RidgeProbe
from tdhook_train.method import Part, look
from tdhook_train.metrics import layer_similarity, probe_transfer
from tdhook_train.ops.folds import fold_of

STEPS = 3
ALPHAS = (0.1, 10.0)


def rows(n=120):
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(n, 3, generator=g), torch.randn(n, generator=g)
    td = {"input": x, "y": x[:, 0] + 0.3 * noise, "z": x[:, 1] * x[:, 2] + 0.1 * noise}
    td |= {"sign": x[:, 0] + noise > 0.4, "three": 4 + (x[:, 2] > 0.4).long() + (x[:, 2] + noise > -0.5)}
    return TensorDict(td, [n]), torch.arange(n) // 6


def run(path, methods, td, groups, change=None, sources=None):
    """A run of a network whose weights change, and what its layers gave out."""
    torch.manual_seed(0)
    model, kept = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), []
    buffer, on = ArtifactBuffer(path), ProbeSet(td, groups=groups)
    with Observer(methods, when=At(0) | Every(optim_steps=1), into=buffer, on=on) as observer:
        for step in range(STEPS):
            observer.step(model, step=step)
            hidden = model[0](td["input"])
            kept.append([v.detach().double().numpy() for v in (hidden, hidden.tanh(), model(td["input"]))])
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.5 * torch.randn_like(p)
                if change is not None:
                    change(model, step)
    return ArtifactBuffer.open(path), kept


def pair_by_pair(kept, y, folds, make, score):
    """``[layer, fitted, applied]``, and what each fold's probe is."""
    out = np.zeros((len(kept[0]), len(kept), len(kept)))
    for layer in range(len(kept[0])):
        for s, fitted in enumerate(kept):
            for k in range(int(folds.max()) + 1):
                train, held = folds != k, folds == k
                probe = make(layer, s).fit(fitted[layer][train], y[train])
                for t, applied in enumerate(kept):
                    out[layer, s, t] += score(y[held], probe.predict(applied[layer][held])) / (int(folds.max()) + 1)
    return out


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    td, groups = rows()
    ridge = RidgeProbe(("1", "2"), ["y", "z"], folds=3, alphas=ALPHAS)
    logistic = LogisticProbe(("1", "2"), ["sign", "three"], folds=3)
    methods = {"ridge": ProbeTransfer(ridge), "logistic": ProbeTransfer(logistic), "own": ridge, "classes": logistic}
    buffer, kept = run(tmp_path_factory.mktemp("r") / "run", methods, td, groups)
    return buffer, kept, td, fold_of(groups, 3).numpy()


def test_ridge_probes_applied_to_other_steps_score_as_scikit_learns(both):
    buffer, kept, td, folds = both
    kept = [row[1:] for row in kept]
    found, alphas = probe_transfer(buffer["ridge"]), buffer["own"].between(keys=["alpha"])["alpha"]
    assert found.dims == ("layer", "target", "fitted", "applied")
    assert found["layer"].values.tolist() == ["1", "2"]
    assert found["fitted"].values.tolist() == found["applied"].values.tolist() == [0, 1, 2]
    for j, target in enumerate(("y", "z")):
        y, at = td[target].double().numpy(), alphas[:, :, j]
        expected = pair_by_pair(kept, y, folds, lambda i, s, at=at: Ridge(alpha=float(at[s, i])), r2_score)
        np.testing.assert_allclose(found.sel(target=target).values, expected, atol=1e-6)


def test_logistic_probes_applied_to_other_steps_score_as_scikit_learns(both):
    buffer, kept, td, folds = both
    kept = [row[1:] for row in kept]
    found = probe_transfer(buffer["logistic"])
    for target in ("sign", "three"):
        settings = {"solver": "newton-cholesky", "tol": 1e-12, "max_iter": 1000}
        y, make = td[target].numpy(), lambda *_, settings=settings: LogisticRegression(**settings)
        expected = pair_by_pair(kept, y, folds, make, balanced_accuracy_score)
        np.testing.assert_allclose(found.sel(target=target).values, expected, atol=1e-9)


def test_the_diagonal_is_what_the_probe_itself_scores(both):
    buffer, *_ = both
    for name, own, key in (("ridge", "own", "r2"), ("logistic", "classes", "balanced_accuracy")):
        diagonal = np.diagonal(probe_transfer(buffer[name]).values, axis1=2, axis2=3)
        score = buffer[own].between(keys=[key])[key].movedim(0, -1)
        np.testing.assert_allclose(diagonal, score, atol=1e-6)
        np.testing.assert_allclose(buffer[name].between(keys=["score"])["score"].movedim(0, -1), score, atol=1e-6)


def test_the_activations_that_are_kept_are_compared_as_those_of_a_cache(both):
    buffer, kept, *_ = both
    found = layer_similarity(buffer["ridge"])
    assert found.shape == (2, STEPS, STEPS)
    np.testing.assert_allclose(buffer["ridge"].between()["activation", "1"][2], kept[2][1], atol=1e-6)


def test_a_layer_that_turns_is_read_by_its_own_probe_alone(tmp_path):
    td, groups = rows()

    def turn(model, step):
        with torch.no_grad():
            model[0].weight.copy_((-1) ** (step + 1) * torch.eye(6)[:, :3])
            model[0].bias.zero_()

    buffer, _ = run(tmp_path / "r", {"t": ProbeTransfer(RidgeProbe("0", "y", alphas=ALPHAS))}, td, groups, turn)
    found = probe_transfer(buffer["t"]).values[0, 0]
    assert found[1, 1] == pytest.approx(found[2, 2])
    assert found[1, 1] > 0.8
    assert found[1, 2] < -1
    assert found[2, 1] < -1


def test_fewer_rows_are_fitted_to_and_kept(tmp_path):
    td, groups = rows()
    probe = RidgeProbe(target="y", alphas=ALPHAS, shifts=0)
    buffer, kept = run(tmp_path / "r", {"t": ProbeTransfer(probe, rows=60)}, td, groups)
    row = buffer["t"].between()
    assert row["activation", "0"].shape == (STEPS, 60, 6)
    assert buffer["t"].coords["batch"] == list(range(0, 120, 2))
    diagonal, folds = probe_transfer(buffer["t"]).values[1, 0], fold_of(groups[::2], 5).numpy()
    x, y = kept[1][1][::2], td["y"][::2].double().numpy()
    each = [pair_by_pair([[x]], y, folds, lambda *_, a=a: Ridge(alpha=a), r2_score)[0, 0, 0] for a in ALPHAS]
    assert diagonal[1, 1] == pytest.approx(max(each), abs=1e-6)


def test_several_networks_lie_end_to_end(tmp_path):
    td, groups = rows()
    torch.manual_seed(0)
    networks, parts = {"actor": nn.Linear(3, 4), "critic": nn.Sequential(nn.Linear(3, 5), nn.Tanh())}, {}
    for name, module in networks.items():
        hooked = HookedModel(module, name=name)
        hooked.trace(td)
        values, _ = look(hooked, td, hooked.sites("**"))
        parts[name] = Part(Seen(td, values, groups=groups), hooked)
    probe = LogisticProbe(target=["sign", "three"])
    joined, own = ProbeTransfer(probe).across(parts), probe.across(parts)
    with ArtifactBuffer(tmp_path / "r") as buffer:
        buffer.declare("t", dims=joined.dims, coords={dim: labels for dim, labels in joined.labels.items() if labels})
        for step in range(2):
            buffer.append("t", joined.tensordict(), step=step)
    found = probe_transfer(ArtifactBuffer.open(tmp_path / "r")["t"])
    assert found["layer"].values.tolist() == own.labels["layer"]
    for pair in np.ndindex(2, 2):
        np.testing.assert_allclose(found.values[:, :, *pair], own.values["balanced_accuracy"], atol=1e-6)


def test_what_cannot_be_said_is_nan(tmp_path):
    td, groups = rows()
    td["one"] = torch.full((len(td),), 2)

    def breaks(model, step):
        if step == 1:
            model[0].bias[0] = torch.inf

    methods = {
        "ridge": ProbeTransfer(RidgeProbe("0", ["y", "one"], alphas=ALPHAS)),
        "logistic": ProbeTransfer(LogisticProbe("0", ["sign", "one"])),
    }
    buffer, _ = run(tmp_path / "r", methods, td, groups, breaks)
    for name in methods:
        found = probe_transfer(buffer[name]).values[0]
        assert np.isnan(found[1]).all()  # of one value
        assert np.isfinite(found[0, :2, :2]).all()
        assert np.isnan(found[0, 2]).all()
        assert np.isnan(found[0, :, 2]).all()
        assert buffer[name].between(keys=["reason"])["reason"][2, 0].tolist() == [4, 4 if name == "ridge" else 1]


def test_one_trajectory_has_no_transfer_and_ridge_refuses_it(tmp_path):
    td, groups = rows()
    alone = torch.zeros_like(groups)
    buffer, _ = run(tmp_path / "r", {"t": ProbeTransfer(LogisticProbe(target="sign"))}, td, alone)
    assert np.isnan(probe_transfer(buffer["t"]).values).all()
    assert buffer["t"].between()["row_fold"].unique().tolist() == [-1]
    with pytest.raises(GroupsError, match="at least 2 groups"):
        run(tmp_path / "s", {"t": ProbeTransfer(RidgeProbe(target="y"))}, td, alone)


def test_steps_on_other_data_are_not_compared_and_classes_go_by_what_they_are(tmp_path):
    g = torch.Generator().manual_seed(0)
    x, folds = torch.randn(12, 2, generator=g), torch.arange(12) % 3
    truth = (x[:, 0] > 0).double()[:, None]
    weight = torch.zeros(1, 1, 3, 2, 2).double()
    weight[..., 1, 0] = 1
    row = {("activation", "l"): x, "weight": weight, "intercept": torch.zeros(1, 1, 3, 2).double(), "row_fold": folds}
    dims = {("activation", "l"): ("batch", "l.unit"), "weight": ("layer", "target", "fold", "class", "unit")}
    dims |= {"intercept": ("layer", "target", "fold", "class"), "row_fold": ("batch",), "truth": ("batch", "target")}
    dims |= {"class_value": ("target", "class")}
    buffer = ArtifactBuffer(tmp_path / "r")
    buffer.declare("a", dims=dims, coords={"layer": ["l"], "target": ["y"]})
    for step, (low, data) in enumerate(((0.0, 5), (7.0, 5), (0.0, 6))):
        classes = torch.tensor([[low, low + 1]]).double()
        buffer.append("a", row | {"truth": truth + low, "class_value": classes}, step=step, data=data)
    found = probe_transfer(buffer["a"]).values[0, 0]
    np.testing.assert_equal(found, [[1, 0, np.nan], [0, 1, np.nan], [np.nan, np.nan, 1]])


def test_what_holds_no_probes_is_refused(tmp_path):
    buffer = ArtifactBuffer(tmp_path / "r")
    buffer.declare("a", dims={("activation", "l"): ("batch", "unit")})
    buffer.append("a", {("activation", "l"): torch.zeros(3, 2)}, step=0)
    with pytest.raises(KeyMissingError, match="probe_transfer needs what ProbeTransfer keeps"):
        probe_transfer(buffer["a"])
    with pytest.raises(SettingsError, match="needs a probe"):
        ProbeTransfer(of=3)
