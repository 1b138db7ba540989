"""What holds for every probe that scores layers: bad data has a defined result with a reason, traps are none."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from method_cases import measured, mlp
from sklearn.linear_model import LogisticRegression, Ridge
from tensordict import TensorDict
from torch import nn

from tdhook_train import HookedModel, Seen
from tdhook_train.errors import GroupsError
from tdhook_train.latent import BilinearProbe, LogisticProbe, MeanDifferenceProbe, RidgeProbe, SklearnProbe
from tdhook_train.method import Part


@dataclass(frozen=True)
class Row:
    make: type
    score: str  # the first of its scores
    classes: bool
    null: str = ""
    p: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    refuses_one_trajectory: bool = False

    def probe(self, target, **settings):
        return self.make(target=target, **dict(self.settings) | {"shifts": 2} | settings)

    @property
    def name(self):
        return " ".join([self.make.__name__, *(f"{key}={value}" for key, value in self.settings)])


def row(make, score, classes, *, refuses_one_trajectory=False, **settings):
    p = "p" if score == "r2" else f"{score}_p"
    return Row(make, score, classes, f"{score}_null", p, tuple(settings.items()), refuses_one_trajectory)


PROBES = (
    row(RidgeProbe, "r2", False, refuses_one_trajectory=True),
    row(LogisticProbe, "balanced_accuracy", True),
    row(MeanDifferenceProbe, "balanced_accuracy", True),
    row(BilinearProbe, "r2", False),
    row(BilinearProbe, "r2", False, rank=1, alphas=(10.0,), folds=3),
    row(SklearnProbe, "r2", False, estimator=Ridge()),
    row(SklearnProbe, "balanced_accuracy", True, folds=3, estimator=LogisticRegression(solver="newton-cholesky")),
)
each = pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)


def trajectories(n=60, length=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g)
    y = x[:, 2] + 0.3 * torch.randn(n, generator=g)
    return TensorDict({"input": x, "quantity": y, "class": y > 0}, [n]), torch.arange(n) // length


def target_of(probe):
    return "class" if probe.classes else "quantity"


def probed(probe, td, groups, model, target=None, settings=None, **known):
    known = {"groups": groups, "ordered": True, "generator": torch.Generator().manual_seed(0)} | known
    return measured(probe.probe(target or target_of(probe), **settings or {}), model, td, **known)


def told(probe, out, key="reason"):
    """What the codes of a reason mean."""
    return [[probe.make.legend[key][int(code)] for code in codes] for codes in out[key].tolist()]


def assert_no_silence(probe, out):
    """A score that is missing has a reason, and one that is there has not (but for the folds that it leaves out)."""
    missing, reasons = out[probe.score].isnan(), told(probe, out)
    for gone, reason in zip(missing.flatten().tolist(), [one for line in reasons for one in line], strict=True):
        assert gone != reason.startswith("scored")
    for code, null in zip(told(probe, out, "null_reason"), out[probe.null].isnan(), strict=True):
        assert [not one.startswith("scored") for one in code] == null.tolist()


class Gives(nn.Module):
    """A layer that does something else to what it is given."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


def after(what):
    return nn.Sequential(nn.Linear(3, 6), Gives(what))


@each
def test_layers_of_unequal_widths_score_as_each_alone(probe):
    td, groups = trajectories()
    model = mlp(3, 70, 2, 1)
    out = probed(probe, td, groups, model)
    for i in range(5):
        alone = probed(probe, td, groups, model, settings={"layers": str(i)})
        torch.testing.assert_close(out[probe.score][i], alone[probe.score][0], rtol=0, atol=1e-9)
    assert_no_silence(probe, out)
    assert out[probe.score].isfinite().all()


@each
def test_a_target_of_one_value_says_so_and_leaves_the_others_alone(probe):
    td, groups = trajectories()
    td["one"] = torch.full((60,), 3) if probe.classes else torch.full((60,), 0.3)
    model = mlp(3, 6, 2)
    known = {"initial": HookedModel(model)}
    out = probed(probe, td, groups, model, ["one", target_of(probe)], **known)
    alone = probed(probe, td, groups, model, **known)
    assert all("one class" in reason or "constant" in reason for reason, _ in told(probe, out))
    for kind in ("", "_pooled", "_observation", "_initial", "_null"):
        assert out[probe.score + kind][:, 0].isnan().all()
        torch.testing.assert_close(out[probe.score + kind][:, 1], alone[probe.score + kind][:, 0], rtol=0, atol=1e-6)
    assert_no_silence(probe, out)


@each
def test_a_target_of_one_value_a_fold_says_so(probe):
    td, _ = trajectories()
    groups = torch.arange(60) // 30
    td["halves"] = groups if probe.classes else groups.float()
    out = probed(probe, td, groups, mlp(3, 6, 2), "halves")
    assert out[probe.score].isnan().all()
    assert all("fold" in line[0] for line in told(probe, out))
    assert_no_silence(probe, out)


@each
def test_activations_that_do_not_vary_know_nothing(probe):
    td, groups = trajectories()
    out = probed(probe, td, groups, after(lambda x: torch.full_like(x, 0.1)))
    assert_no_silence(probe, out)
    score = float(out[probe.score][1, 0])
    assert score == pytest.approx(0.5) if probe.classes else -1 < score < 1e-9
    assert float(out[probe.null][1, 0]) == pytest.approx(score, abs=1e-5)  # the same whatever is shifted
    assert not probe.classes or float(out[probe.p][1, 0]) == 1  # ties count against it


@each
def test_activations_of_low_rank_score_as_what_they_hold(probe):
    td, groups = trajectories()
    out = probed(probe, td, groups, after(lambda x: torch.cat([x, x, x, x], 1) / 2))  # every distance is kept
    assert_no_silence(probe, out)
    assert float(out[probe.score][1, 0]) == pytest.approx(float(out[probe.score][0, 0]), abs=1e-5)


@each
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_say_so_and_leave_the_others_alone(probe, bad):
    td, groups = trajectories()
    whole = mlp(3, 6, 2)
    broken = nn.Sequential(*whole[:2], Gives(lambda x: torch.where(torch.arange(len(x))[:, None] == 3, bad, x)))
    out, alone = probed(probe, td, groups, broken), probed(probe, td, groups, whole)
    assert told(probe, out)[2] == ["the activations are not finite"]
    for kind in ("", "_pooled", "_null"):
        assert out[probe.score + kind][2].isnan().all()
        torch.testing.assert_close(out[probe.score + kind][:2], alone[probe.score + kind][:2], rtol=0, atol=1e-6)
    assert_no_silence(probe, out)


@each
def test_inputs_that_are_not_finite_have_no_baseline(probe):
    td, groups = trajectories()
    td["input"][3, 0] = torch.nan
    out = probed(probe, td, groups, nn.Sequential(Gives(torch.nan_to_num), nn.Linear(3, 4)))
    assert out[probe.score].isfinite().all()
    assert out[f"{probe.score}_observation"].isnan().all()


@each
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_target_that_is_not_finite_says_so(probe, bad):
    if probe.classes:
        pytest.skip("classes are whole numbers")
    td, groups = trajectories()
    td["bad"] = td["quantity"].clone()
    td["bad"][7] = bad
    out = probed(probe, td, groups, mlp(3, 6, 2), ["quantity", "bad"])
    assert [line[1] for line in told(probe, out)] == ["the target is not finite"] * 3
    assert out[probe.score][:, 0].isfinite().all()
    assert out[probe.score][:, 1].isnan().all()
    assert_no_silence(probe, out)


@each
def test_one_trajectory_is_told(probe):
    td, groups = trajectories()
    if probe.refuses_one_trajectory:
        with pytest.raises(GroupsError, match="at least 2 groups"):
            probed(probe, td, torch.zeros_like(groups), mlp(3, 6, 2))
        return
    out = probed(probe, td, torch.zeros_like(groups), mlp(3, 6, 2))
    assert told(probe, out) == [["there is one trajectory, so none can be held out"]] * 3
    for kind in ("", "_pooled", "_observation", "_initial", "_null"):
        assert out[probe.score + kind].isnan().all()
    assert_no_silence(probe, out)


@each
def test_fewer_trajectories_than_folds_leave_one_out(probe):
    td, _ = trajectories()
    groups = torch.arange(60) // 20
    model = mlp(3, 6, 2)
    out, three = (probed(probe, td, groups, model, settings={"folds": folds}) for folds in (5, 3))
    assert out[probe.score].isfinite().all()
    torch.testing.assert_close(out[probe.score], three[probe.score], rtol=0, atol=0)


@each
def test_rows_that_are_not_trajectories_in_order_have_no_null(probe):
    td, groups = trajectories()
    unordered = "rows are not whole trajectories in time order"
    for known, shifts, why in (
        ({"ordered": False}, 2, unordered),
        ({"groups": None}, 2, unordered),
        ({}, 0, "no shifts were asked for"),
    ):
        out = probed(probe, td, known.pop("groups", groups), mlp(3, 6, 2), settings={"shifts": shifts}, **known)
        assert out[probe.score].isfinite().all()
        assert told(probe, out, "null_reason") == [[why]] * 3
        assert_no_silence(probe, out)


@each
def test_two_networks_together_are_each_alone(probe):
    td, groups = trajectories()
    models = {"actor": mlp(3, 6, 2), "critic": mlp(3, 70, 1)}
    method = probe.probe(target_of(probe))

    def part(name):
        hooked = HookedModel(models[name], name=name)
        hooked.trace(td)
        with hooked.run(td) as run:
            values = {site: run.get(site) for site in method.taps(hooked)}
        values = {site: value.resolve() for site, value in values.items()}
        generator, initial = torch.Generator().manual_seed(0), HookedModel(mlp(3, 6, 2), name=name)
        return Part(Seen(td, values, groups=groups, ordered=True, generator=generator, initial=initial), hooked)

    parts = {name: part(name) for name in models}
    both = method.across(parts)
    assert both.labels["layer"] == ["actor.0", "actor.1", "actor.2", "critic.0", "critic.1", "critic.2"]
    for i, name in enumerate(models):
        alone = method.across({name: parts[name].told(generator=torch.Generator().manual_seed(0), memo={})})
        for key, value in alone.values.items():
            if not key.endswith("_null") and key != "direction":
                given = both.values[key][3 * i : 3 * i + 3]
                torch.testing.assert_close(given, value, equal_nan=True, rtol=0, atol=1e-9)


@each
def test_labels_that_a_trajectory_has_throughout_and_no_state_knows_are_not_read(probe):
    # frames of one trajectory are alike: whoever splits by frame finds its label by remembering the trajectory
    g = torch.Generator().manual_seed(1)
    groups = torch.arange(16).repeat_interleave(10)
    x = torch.randn(16, 20, generator=g)[groups] + 0.1 * torch.randn(160, 20, generator=g)
    y = torch.randn(16, 12, generator=g)[groups] + 0.01 * torch.randn(160, 12, generator=g)
    if probe.classes:  # both in every trajectory, if rarely
        y = torch.stack([torch.randperm(16, generator=g)[groups] % 2 for _ in range(12)], 1)
        y = torch.where(torch.arange(160)[:, None] % 10 == 0, 1 - y, y)
    td, model = TensorDict({"input": x, "y": y}, [160]), nn.Sequential(nn.Identity())
    by_trajectory, by_frame = (
        probed(probe, td, known, model, "y", {"shifts": 0})[probe.score].mean() for known in (groups, None)
    )
    assert float(by_frame) > (0.65 if probe.classes else 0.5)
    assert float(by_trajectory) < (0.53 if probe.classes else 0)


@each
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_autograd_change_nothing(probe, mode):
    td, groups = trajectories()
    model = mlp(3, 6, 2)
    expected = probed(probe, td, groups, model)
    with mode():
        given = TensorDict({key: value.clone() for key, value in td.items()}, td.batch_size)
        out = probed(probe, given, groups, model)
    for key in (probe.score, probe.null, f"{probe.score}_observation"):
        torch.testing.assert_close(out[key], expected[key], rtol=0, atol=0, equal_nan=True)


@each
def test_what_is_remembered_between_ticks_never_changes_a_result(probe):
    td, groups = trajectories()
    model, memo, initial = mlp(3, 6, 2), {}, HookedModel(mlp(3, 6, 2))
    one, two, three = (probed(probe, td, groups, model, memo=m, initial=initial) for m in (memo, memo, {}))
    for key in (probe.score, probe.null, f"{probe.score}_observation", f"{probe.score}_initial"):
        assert one[key].isfinite().all()
        assert torch.equal(one[key], two[key])
        assert torch.equal(one[key], three[key])


@each
def test_a_target_that_changes_between_ticks_has_its_own_baselines(probe):
    td, groups = trajectories()
    model, memo, initial = mlp(3, 6), {}, HookedModel(mlp(3, 6))
    before = probed(probe, td, groups, model, memo=memo, initial=initial)
    td[target_of(probe)] = td["input"][:, 0] > 0 if probe.classes else td["input"][:, 0]
    after, fresh = (probed(probe, td, groups, model, memo=m, initial=initial) for m in (memo, {}))
    for key in (f"{probe.score}_observation", f"{probe.score}_initial"):
        assert torch.equal(after[key], fresh[key])
        assert not torch.equal(after[key], before[key])


@each
def test_the_global_random_state_is_left_alone(probe):
    td, groups = trajectories()
    before = torch.get_rng_state()
    out = probed(probe, td, groups, mlp(3, 6, 2), generator=torch.Generator().manual_seed(1))
    assert out[probe.null].isfinite().all()
    assert not torch.equal(torch.get_rng_state(), before)  # by the model above
    before = torch.get_rng_state()
    probed(probe, td, groups, nn.Sequential(nn.Identity()))
    assert torch.equal(torch.get_rng_state(), before)
