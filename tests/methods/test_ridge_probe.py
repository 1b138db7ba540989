"""RidgeProbe against scikit-learn, and what it says where there is nothing to say."""

import numpy as np
import pytest
import torch
from method_cases import measured, mlp
from sklearn.linear_model import Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_score
from tensordict import TensorDict
from torch import nn

from tdhook_train import HookedModel, Seen
from tdhook_train.errors import GroupsError, TargetError
from tdhook_train.latent import RidgeProbe
from tdhook_train.method import Part
from tdhook_train.ops.folds import circular_shifts, fold_of

ALPHAS = (1e-2, 1.0, 1e2)


def trajectories(n=160, length=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g)
    y = x[:, 0] * x[:, 1] + 0.1 * torch.randn(n, generator=g)
    groups = torch.arange(n) // length
    return TensorDict({"input": x, "product": y, "linear": x[:, 2] + 1}, [n]), groups


def by_scikit_learn(x, y, folds, alphas=ALPHAS):
    x, y, split = x.double().numpy(), y.double().numpy(), PredefinedSplit(folds.numpy())
    return [cross_val_score(Ridge(alpha=a, solver="svd"), x, y, cv=split, scoring="r2").mean() for a in alphas]


def probed(td, groups, model=None, probe=None, **known):
    known = {"groups": groups, "ordered": True, "generator": torch.Generator().manual_seed(0)} | known
    return measured(probe or RidgeProbe(target="y", alphas=ALPHAS), model or mlp(3, 6, 2), td, **known)


def test_every_layer_and_target_scores_as_in_scikit_learn_at_its_best_penalty():
    td, groups = trajectories()
    model = mlp(3, 40, 5, 2)
    probe = RidgeProbe(target=["product", "linear"], alphas=ALPHAS)
    out, folds = probed(td, groups, model, probe), fold_of(groups, 5)
    values = [td["input"]]
    for layer in model:
        values.append(layer(values[-1]).detach())
    assert out["r2"].shape == (5, 2)
    for i, value in enumerate(values[1:]):
        for j, target in enumerate(("product", "linear")):
            path = by_scikit_learn(value, td[target], folds)
            assert np.abs(out["r2_path"][i, j].numpy() - path).max() < 1e-9
            assert abs(float(out["r2"][i, j]) - max(path)) < 1e-9
            assert float(out["alpha"][i, j]) == ALPHAS[int(np.argmax(path))]
            observed = max(by_scikit_learn(td["input"], td[target], folds))
            assert abs(float(out["r2_observation"][i, j]) - observed) < 1e-9
    assert out["r2_initial"].isnan().all()  # by hand there is no initial network
    assert not out["reason"].any()
    assert not out["null_reason"].any()


def test_the_initial_network_is_probed_as_it_was():
    td, groups = trajectories()
    first, now = mlp(3, 6, 2), mlp(3, 6, 2)
    initial = HookedModel(first)
    out = probed(td, groups, now, RidgeProbe(target="product", alphas=ALPHAS), initial=initial)
    expected = probed(td, groups, first, RidgeProbe(target="product", alphas=ALPHAS))
    torch.testing.assert_close(out["r2_initial"], expected["r2"])
    assert not torch.allclose(out["r2"], expected["r2"])


REASONS = {
    "constant": (lambda y, folds: torch.full_like(y, 0.3), 1),
    "constant in every fold": (lambda y, folds: folds.float() * 0.7 + 0.1, 2),
    "not finite": (lambda y, folds: torch.where(torch.arange(len(y)) == 5, torch.nan, y), 3),
    "infinite": (lambda y, folds: torch.where(torch.arange(len(y)) == 5, torch.inf, y), 3),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_target_that_cannot_be_scored_says_why_and_leaves_the_others_alone(name):
    td, groups = trajectories()
    folds = fold_of(groups, 5)
    make, code = REASONS[name]
    td["y"] = make(td["product"], folds)
    model = mlp(3, 6, 2)
    out = probed(td, groups, model, RidgeProbe(target=["product", "y"], alphas=ALPHAS), initial=HookedModel(model))
    alone = probed(td, groups, model, RidgeProbe(target="product", alphas=ALPHAS), initial=HookedModel(model))
    assert out["reason"][:, 1].tolist() == [code] * 3
    assert RidgeProbe.legend["reason"][code].startswith(("the target is constant", "the target is not finite"))
    assert out["null_reason"][:, 1].tolist() == [1] * 3
    for key in ("r2", "r2_pooled", "r2_path", "r2_observation", "r2_initial", "r2_null", "p"):
        assert out[key][:, 1].isnan().all()
        # shifts are scored in float32
        close = 1e-6 if key == "r2_null" else 1e-9
        torch.testing.assert_close(out[key][:, :1], alone[key], equal_nan=True, rtol=close, atol=close)


def test_a_target_that_is_constant_in_one_fold_is_scored_on_the_others():
    td, groups = trajectories(350, 10)  # folds of 70 rows: the mean of 70 equal numbers is rounded
    for fold in range(5):
        td["y"] = torch.where(fold_of(groups, 5) == fold, 0.1, td["linear"])
        assert (probed(td, groups)["r2"].abs() < 10).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_layer_whose_activations_are_not_finite_says_so_and_leaves_the_others_alone(bad):
    class Breaks(nn.Module):
        def forward(self, x):
            return torch.where(torch.arange(len(x))[:, None] == 3, bad, x)

    td, groups = trajectories()
    td["y"] = td["product"]
    whole, broken = mlp(3, 6, 2), mlp(3, 6, 2)
    broken = nn.Sequential(whole[0], whole[1], Breaks())
    out, alone = probed(td, groups, broken), probed(td, groups, whole)
    assert out["reason"][:, 0].tolist() == [0, 0, 4]
    assert out["r2"][2].isnan().all()
    assert out["p"][2].isnan().all()
    torch.testing.assert_close(out["r2"][:2], alone["r2"][:2])
    torch.testing.assert_close(out["r2_null"][:2], alone["r2_null"][:2])
    assert out["r2_observation"].isfinite().all()


def test_without_trajectories_rows_count_as_independent_and_there_is_no_null():
    td, _ = trajectories()
    td["y"] = td["linear"]
    out = probed(td, None)
    expected = max(by_scikit_learn(td["input"], td["y"], fold_of(torch.arange(len(td)), 5)))
    assert abs(float(out["r2_observation"][0, 0]) - expected) < 1e-9
    assert out["null_reason"].flatten().tolist() == [2] * 3
    assert out["r2_null"].isnan().all()


@pytest.mark.parametrize(
    ("known", "shifts", "code"),
    [({"ordered": False}, 39, 2), ({"mixed": True}, 39, 2), ({}, 0, 3), ({}, 39, 0)],
)
def test_why_there_is_no_null(known, shifts, code):
    td, groups = trajectories()
    td["y"] = td["linear"]
    if known.pop("mixed", False):
        groups = groups[torch.randperm(len(groups))]
    out = probed(td, groups, None, RidgeProbe(target="y", alphas=ALPHAS, shifts=shifts), **known)
    assert out["null_reason"].flatten().tolist() == [code] * 3
    assert out["r2_null"].isnan().all() == (code != 0)
    assert out["p"].isnan().all() == (code != 0)


def test_the_null_is_the_38th_of_39_and_p_counts_the_score_itself():
    td, groups = trajectories()
    td["y"] = torch.randn(len(td), generator=torch.Generator().manual_seed(1))  # knows nothing of the layer
    model, generator = mlp(3, 6, 2), torch.Generator().manual_seed(5)
    out = probed(td, groups, model, generator=generator)
    shifts = circular_shifts(groups, 39, torch.Generator().manual_seed(5))
    value = model[0](td["input"]).detach()
    scores = sorted(max(by_scikit_learn(value, td["y"][s], fold_of(groups, 5))) for s in shifts)
    assert abs(float(out["r2_null"][0, 0]) - scores[37]) < 1e-5
    beaten = sum(s >= float(out["r2"][0, 0]) for s in scores)
    assert 0 < beaten < 39
    assert float(out["p"][0, 0]) == pytest.approx((1 + beaten) / 40)


def test_the_null_of_fewer_shifts_than_a_test_needs_is_the_best_of_them():
    td, groups = trajectories()
    td["y"] = td["product"]
    model = mlp(3, 6, 2)
    for shifts in (1, 5):
        probe = RidgeProbe(target="y", alphas=ALPHAS, shifts=shifts)
        out = probed(td, groups, model, probe, generator=torch.Generator().manual_seed(5))
        turned = circular_shifts(groups, shifts, torch.Generator().manual_seed(5))
        value = model[0](td["input"]).detach()
        best = max(max(by_scikit_learn(value, td["y"][s], fold_of(groups, 5))) for s in turned)
        assert abs(float(out["r2_null"][0, 0]) - best) < 1e-5


def test_the_null_is_calibrated_on_autocorrelated_trajectories_that_know_nothing_of_the_layer():
    g, tests, rejected = torch.Generator().manual_seed(0), 200, 0
    length, many = 30, 10
    groups = torch.arange(many).repeat_interleave(length)
    probe = RidgeProbe(layers="", target="y", alphas=(1.0, 100.0))

    def ar1(width):
        noise = torch.randn(many, length, width, generator=g)
        for t in range(1, length):
            noise[:, t] += 0.9 * noise[:, t - 1]
        return noise.flatten(0, 1)

    hooked = HookedModel(nn.Identity())
    for _ in range(tests):
        td = TensorDict({"input": ar1(3), "y": ar1(1)[:, 0]}, [many * length])
        hooked.trace(td)
        seen = Seen(td, {"": td["input"]}, groups=groups, ordered=True, generator=g)
        rejected += float(probe.measure(seen, hooked)["p"]) <= 0.05
    assert 0.01 * tests <= rejected <= 0.12 * tests  # 5 % of 200, and not a test that never rejects


def test_two_networks_together_are_each_alone():
    td, groups = trajectories()
    models = {"actor": mlp(3, 6, 2), "critic": mlp(3, 70, 1)}  # of widths that are solved in different batches
    probe = RidgeProbe(target=["product", "linear"], alphas=ALPHAS)

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
    assert both.labels["layer_type"] == ["Linear", "Tanh", "Linear"] * 2
    assert both.labels["target"] == ["product", "linear"]
    for i, name in enumerate(models):
        alone = probe.across({name: part(name)})
        for key, value in alone.values.items():
            torch.testing.assert_close(both.values[key][3 * i : 3 * i + 3], value, equal_nan=True, rtol=1e-6, atol=1e-7)
    only = RidgeProbe(target="linear", alphas=ALPHAS, layers="critic.**").across({n: part(n) for n in models})
    assert only.labels["layer"] == ["critic.0", "critic.1", "critic.2"]


def test_fewer_trajectories_than_folds_and_only_one():
    td, _ = trajectories()
    td["y"] = td["linear"]
    groups = torch.arange(len(td)) // 60
    expected = max(by_scikit_learn(td["input"], td["y"], groups))  # leave one out
    assert abs(float(probed(td, groups)["r2_observation"][0, 0]) - expected) < 1e-9
    with pytest.raises(GroupsError, match="needs rows of at least 2 groups, got 1"):
        probed(td, torch.zeros(len(td), dtype=torch.int64))
    with pytest.raises(GroupsError, match="80 trajectory ids for 160 rows"):
        probed(td, groups[:80])


def test_layers_with_positions_are_flattened_to_a_row_a_sample():
    td, groups = trajectories()
    td["y"] = td["linear"]
    model = nn.Sequential(nn.Unflatten(1, (1, 1, 3)), nn.Conv2d(1, 2, 1))
    out = probed(td, groups, model)
    expected = max(by_scikit_learn(model(td["input"]).detach().flatten(1), td["y"], fold_of(groups, 5)))
    assert abs(float(out["r2"][1, 0]) - expected) < 1e-9


def test_a_target_without_rows_is_refused():
    td, groups = trajectories()
    td["y"] = td["linear"]
    with pytest.raises(TargetError, match="its first dimension must be the 160 rows"):
        probed(td, groups, None, RidgeProbe(target=lambda t: t["y"].sum()))


def test_outputs_of_the_network_are_targets_too():
    td, groups = trajectories()
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))
    out = probed(td, groups, model, RidgeProbe(target="output", alphas=(1e-2,)))
    assert (out["r2"] > 0.999).all()
    assert out["r2"].shape == (2, 2)


def test_what_is_remembered_between_ticks_never_changes_a_result():
    td, groups = trajectories()
    td["y"] = td["linear"]
    model, memo = mlp(3, 6, 2), {}
    initial = HookedModel(mlp(3, 6, 2))
    one = probed(td, groups, model, memo=memo, initial=initial)
    two = probed(td, groups, model, memo=memo, initial=initial)
    three = probed(td, groups, model, initial=initial)
    assert memo
    for key in RidgeProbe.writes.keys() - {"direction", "intercept"}:  # which were not asked for
        assert torch.equal(one[key], two[key])
        assert torch.equal(one[key], three[key])


def test_a_layer_that_gives_out_more_rows_than_samples_is_refused():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(1, 2)

        def forward(self, x):
            return self.second(self.first(x).reshape(-1, 1)).reshape(len(x), -1)

    td, groups = trajectories()
    with pytest.raises(GroupsError, match="one row a sample"):
        probed(td, groups, Mixes(), RidgeProbe(target="linear"))


def test_what_is_too_wide_to_solve_is_nan_with_its_reason_and_the_rest_is_scored():
    model = nn.Sequential(nn.Linear(5000, 4), nn.Tanh(), nn.Linear(4, 5000))
    td = TensorDict({"input": torch.randn(60, 5000), "y": torch.randn(60)}, [60])
    out = measured(RidgeProbe(target="y", shifts=0), model, td)
    assert out["reason"][:, 0].tolist() == [0, 0, 5]
    assert out["r2"][:2].isfinite().all()
    assert out["r2"][2].isnan().all()
    assert out["r2_observation"].isnan().all()  # the raw input is too wide as well
