"""ControlTask on representations whose selectivity is known, and against the same probes on its control alone."""

import numpy as np
import pytest
import torch
from method_cases import measured, mlp
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import PredefinedSplit, cross_val_score
from tensordict import TensorDict
from torch import nn
from torch.nn import functional

from tdhook_train import ArtifactBuffer, At, HookedModel, Observer, ProbeSet, Seen
from tdhook_train.errors import KeyMissingError, PathError, SettingsError, TargetError
from tdhook_train.latent import ControlTask, LogisticProbe, MdlProbe, RidgeProbe
from tdhook_train.method import Part, look
from tdhook_train.ops.folds import fold_of

IDENTITY = nn.Sequential(nn.Identity())


def words(n=400, types=20, length=8, seed=0):
    """Rows of random words; a word has a place in a plane, and its target is one of the coordinates."""
    g = torch.Generator().manual_seed(seed)
    token, plane = torch.randint(types, (n,), generator=g), torch.randn(types, 2, generator=g)
    td = {"token": token, "one_hot": functional.one_hot(token, types).float(), "plane": plane[token]}
    td |= {"y": plane[token, 0], "kind": plane[token, 1] > plane[:, 1].median()}
    return TensorDict(td, [n]), torch.arange(n) // length


def of(td, groups, method, key, **known):
    return measured(method, IDENTITY, td.copy().set("input", td[key]), groups=groups, **known)


PROBES = [
    (RidgeProbe(target="y", shifts=0), "r2"),
    (LogisticProbe(target="kind", shifts=0, C=100.0), "balanced_accuracy"),
]


@pytest.mark.parametrize(("probe", "score"), PROBES)
def test_a_layer_that_names_the_type_does_any_task_and_is_not_selective(probe, score):
    td, groups = words()
    out = of(td, groups, ControlTask(probe, "token"), "one_hot")
    assert float(out[score]) == pytest.approx(1, abs=0.01)
    assert float(out[score + "_control"]) == pytest.approx(1, abs=0.01)
    assert abs(float(out["selectivity"])) < 0.01


@pytest.mark.parametrize(("probe", "score"), [*PROBES, (MdlProbe(target="kind"), "compression")])
def test_a_layer_that_holds_the_target_in_few_dimensions_is_selective(probe, score):
    td, groups = words(types=100)
    out = of(td, groups, ControlTask(probe, "token"), "plane")
    assert float(out[score]) > 0.95
    assert float(out[score + "_control"]) < {"r2": 0.3, "balanced_accuracy": 0.75, "compression": 1.2}[score]
    assert float(out["selectivity"]) == pytest.approx(float(out[score] - out[score + "_control"]))
    assert float(out["selectivity"]) > 0.25


def test_the_control_gives_each_type_one_output_that_the_target_has_the_same_at_every_call():
    td, _ = words(types=50)
    probe = LogisticProbe(target={"k": "kind", "y": lambda td: td["token"] % 3})
    method = ControlTask(probe, "token")
    control, again, other = (one.control(td) for one in (method, method, ControlTask(probe, "token", seed=1)))
    assert list(control) == ["k", "y"]
    for name, values in (("k", td["kind"]), ("y", td["token"] % 3)):
        for token in range(50):
            assert len(control[name][td["token"] == token].unique()) == 1
        assert torch.equal(control[name], again[name])
        assert not torch.equal(control[name], other[name])
        assert control[name].dtype == values.dtype
        assert set(control[name].tolist()) == set(values.tolist())
    assert not torch.equal(control["k"], td["kind"])


def test_outputs_are_drawn_as_often_as_the_target_has_them():
    td = TensorDict(token=torch.arange(20_000), y=(torch.arange(20_000) % 10 == 0), batch_size=[20_000])
    control = ControlTask(LogisticProbe(target="y"), "token").control(td)["y"]
    assert float(control.double().mean()) == pytest.approx(0.1, abs=4 * (0.09 / 20_000) ** 0.5)
    assert float((control & td["y"]).double().mean()) == pytest.approx(0.01, abs=0.003)  # whatever the row's own is


def test_types_are_keys_features_functions_or_several_numbers_together():
    td, _ = words()
    td["pair"] = torch.stack([td["token"] % 4, td["token"] // 4], 1)
    td["odd"] = td["token"] % 2 == 1
    control = ControlTask(RidgeProbe(target="y"), "token").control(td)["y"]
    together = ControlTask(RidgeProbe(target="y"), "pair").control(td)["y"]
    called = ControlTask(RidgeProbe(target="y"), lambda td: td["token"]).control(td)["y"]
    assert torch.equal(called, control)
    assert len(together.unique()) > 10
    for token in range(20):
        assert len(together[td["token"] == token].unique()) == 1
    for types in (("pair", 0), "odd"):
        one = ControlTask(RidgeProbe(target="y"), types).control(td)["y"]
        assert len(one.unique()) <= 4
    with pytest.raises(TargetError, match=r"types '<lambda>' has \(3,\); its first dimension must be the 400 rows"):
        ControlTask(RidgeProbe(target="y"), lambda td: torch.zeros(3)).control(td)
    with pytest.raises(KeyMissingError, match="did you mean 'token'"):
        ControlTask(RidgeProbe(target="y"), "tokn").control(td)
    with pytest.raises(SettingsError, match="ControlTask needs a probe of layers"):
        ControlTask(nn.Linear(1, 1), "token")


def test_scores_are_those_of_the_probe_on_the_target_and_of_scikit_learn_on_the_control():
    td, groups = words(160, 40)
    td["input"], model, folds = td["plane"], mlp(2, 5, 2), fold_of(groups, 5)
    ridge = RidgeProbe(target="y", alphas=(0.5,), shifts=3, directions=True)
    logistic = LogisticProbe(target="kind", shifts=3)
    known = {"groups": groups, "ordered": True}
    x = model[0](td["input"]).detach().double().numpy()
    for probe, score in ((ridge, "r2"), (logistic, "balanced_accuracy")):
        method = ControlTask(probe, "token", seed=5)
        out = measured(method, model, td, generator=torch.Generator().manual_seed(0), **known)
        alone = measured(probe, model, td, generator=torch.Generator().manual_seed(0), **known)
        for key in set(alone.keys()) - {"output"} - set(td.keys()):
            torch.testing.assert_close(out[key], alone[key], equal_nan=True, rtol=0, atol=0)
        control, split = next(iter(method.control(td).values())).numpy(), PredefinedSplit(folds.numpy())
        if score == "r2":
            expected = cross_val_score(Ridge(alpha=0.5), x, control.astype(float), cv=split, scoring="r2").mean()
        else:
            each = []
            for train, held in split.split():
                model_ = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(x[train], control[train])
                each.append(balanced_accuracy_score(control[held], model_.predict(x[held])))
            expected = np.mean(each)
        assert float(out[score + "_control"][0, 0]) == pytest.approx(expected, abs=1e-6)
        assert not out["reason_control"].any()
        assert method.legend["reason_control"] == probe.legend["reason"]
        assert method.shown == (*probe.shown, score + "_control", "selectivity")


def test_a_control_that_cannot_be_scored_says_why_and_leaves_the_score():
    td, groups = words()
    td["type"] = torch.zeros(400)
    out = of(td, groups, ControlTask(LogisticProbe(target="kind", shifts=0), "type"), "plane")
    assert out["reason"].item() == 0
    assert out["reason_control"].item() == 1
    assert out["balanced_accuracy"].isfinite().all()
    assert out["selectivity"].isnan().all()
    assert out["balanced_accuracy_control"].isnan().all()


def test_what_is_remembered_changes_nothing():
    class Counts(nn.Module):
        passes = 0

        def forward(self, x):
            self.passes += 1
            return x

    td, groups = words()
    for probe in (RidgeProbe(target="y", shifts=0), LogisticProbe(target="kind", shifts=0), MdlProbe(target="kind")):
        memo, counts = {}, Counts()
        method, known = ControlTask(probe, "token"), {"initial": HookedModel(nn.Sequential(counts))}
        one, two = (of(td, groups, method, "plane", memo=memo, **known) for _ in range(2))
        assert counts.passes == 1  # the control does not push out what the target needs
        anew = of(td, groups, method, "plane", **known)
        for key in set(method.writes) - {"direction", "intercept"}:
            torch.testing.assert_close(one[key], two[key], equal_nan=True, rtol=0, atol=0)
            torch.testing.assert_close(one[key], anew[key], equal_nan=True, rtol=0, atol=0)


def test_two_networks_together_are_each_alone():
    td, groups = words()
    td["input"] = td["plane"]
    method, models = ControlTask(RidgeProbe(target="y", shifts=0), "token"), {"a": mlp(2, 5, 2), "b": mlp(2, 70, 1)}

    def part(name):
        hooked = HookedModel(models[name], name=name)
        hooked.trace(td)
        return Part(Seen(td, look(hooked, td, hooked.sites("**"))[0], groups=groups), hooked)

    both = method.across({name: part(name) for name in models})
    assert both.labels["layer"] == [f"{name}.{i}" for name in models for i in range(3)]
    for i, name in enumerate(models):
        for key, value in method.across({name: part(name)}).values.items():
            torch.testing.assert_close(both.values[key][3 * i : 3 * i + 3], value, equal_nan=True)


def test_live_on_a_probe_set_each_row_has_both_scores_and_loggers_are_told(tmp_path):
    td, groups = words()
    td["input"] = td["plane"]
    model, buffer = mlp(2, 5, 2), ArtifactBuffer(tmp_path / "run")
    methods = {"mdl": ControlTask(MdlProbe(target="kind"), "token"), "r": ControlTask(RidgeProbe(target="y"), "token")}
    with Observer(methods, when=At(0, 1), into=buffer, on=ProbeSet(td, groups=groups)) as observer:
        for step in range(2):
            observer.step(model, step=step)
        assert {"mdl/selectivity/kind", "mdl/compression_control/kind", "r/selectivity/y"} <= set(observer.scalars)
    rows = ArtifactBuffer.open(tmp_path / "run")["mdl"].between()
    assert rows["selectivity"].shape == (2, 3, 1)
    torch.testing.assert_close(rows["compression_control"][0], rows["compression_control"][1])
    one = measured(methods["mdl"], model, td, groups=groups)
    torch.testing.assert_close(one["selectivity"], rows["selectivity"][0])


def test_layers_and_networks_are_the_probes_own():
    td, groups = words()
    with pytest.raises(PathError, match="'9' matches no module"):
        of(td, groups, ControlTask(RidgeProbe("9", "y"), "token"), "plane")
    named = ControlTask(RidgeProbe(target="y", networks=("a",), shifts=0), "token")
    assert named.networks == ("a",)
    assert list(named.chosen({"a": 1, "b": 2})) == ["a"]
