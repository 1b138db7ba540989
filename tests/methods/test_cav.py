"""Concept activation vectors: the null, by labels given one by one, and when there is none."""

import pytest
import torch
from method_cases import above_zero, batch, measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train import ArtifactBuffer, At, HookedModel, Observer, ProbeSet
from tdhook_train.latent import Cav, MeanDifferenceDirection
from tdhook_train.method import Part, Seen, look


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def test_the_null_is_the_same_method_on_labels_without_a_meaning():
    """Slowly: each labelling is given as the concept."""
    td = td_of(input=torch.randn(40, 4), label=torch.arange(40) % 2 > 0)
    method = Cav("", "label", nulls=3, cav="mean-difference")
    found = measured(method, nn.Identity(), td, generator=torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    for draw in range(3):
        td["other"] = td["label"][torch.randperm(40, generator=g)]
        own = measured(MeanDifferenceDirection("", "other"), nn.Identity(), td)
        assert_close(found["null"][0, draw], own["accuracy"][0])
    p = (1 + (found["null"][0] >= found["accuracy"]).sum().item()) / 4
    assert found["p_value"].item() == p


def test_the_null_of_a_contrast_swaps_the_versions_of_a_row():
    """Slowly: each swap is given as labelled rows, both versions of a row in one fold."""
    plus, minus = torch.randn(30, 3), torch.randn(30, 3)
    contrast = TensorDict({("positive", "input"): plus, ("negative", "input"): minus}, [30])
    method = Cav("", nulls=4, cav="mean-difference")
    found = measured(method, nn.Identity(), contrast, generator=torch.Generator().manual_seed(5))
    swaps = torch.rand(4, 30, generator=torch.Generator().manual_seed(5)) < 0.5
    for swap, accuracy in zip(swaps, found["null"][0], strict=True):
        rows = td_of(input=torch.cat([plus, minus]), label=torch.cat([swap, ~swap]))
        own = measured(MeanDifferenceDirection("", "label"), nn.Identity(), rows, groups=torch.arange(30).repeat(2))
        assert_close(accuracy, own["accuracy"][0])
    assert found["p_value"].item() == (1 + (found["null"][0] >= found["accuracy"]).sum().item()) / 5


def test_a_null_that_is_as_good_counts_as_such():
    td = td_of(input=torch.arange(12.0)[:, None] % 2, label=torch.arange(12) % 2 > 0)
    turned = measured(Cav("", "label"), nn.Identity(), td, groups=torch.arange(12) // 4, ordered=True)
    assert turned["accuracy"].item() == 1
    assert (turned["null"] == 1).any()  # turned by two steps, or turned round in every trajectory
    assert turned["p_value"].item() == (1 + (turned["null"] == 1).sum().item()) / 20


def test_rows_that_are_said_to_be_independent_are_drawn_anew(tmp_path):
    model, td = mlp(3, 5, 2), batch(40)
    method = Cav("1", above_zero, folds=2, nulls=19, cav="mean-difference")
    with Observer({"cav": method}, when=At(0), into=tmp_path, on=ProbeSet(td, groups="rows")) as observer:
        observer.step(model, step=0)
    row = ArtifactBuffer.open(tmp_path)["cav"].at(0)
    assert row["null_reason"].tolist() == [0]
    assert row["p_value"].item() == 1 / 20
    assert len(row["null"].unique()) > 5


@pytest.mark.parametrize("concept", [above_zero, None])
def test_of_several_networks_each_layer_is_named_by_its_own(concept):
    td, nets = batch(30), {"actor": mlp(3, 6, 2), "critic": mlp(3, 4, 4, 1)}
    method = Cav(nn.Tanh, concept, folds=2, nulls=3, cav="mean-difference")
    parts = {}
    for name, net in nets.items():
        model = HookedModel(net, name=name)
        model.trace(td)
        parts[name] = Part(Seen(td, look(model, td, method.taps(model))[0]), model)
    found = method.across(parts)
    assert found.labels["layer"] == ["actor.1", "critic.1", "critic.3"]
    assert found.values["null"].shape == (3, 3)
    for name, layer, row in (("actor", "1", 0), ("critic", "1", 1), ("critic", "3", 2)):
        own = measured(method, nets[name], td)
        place = list(nets[name].named_children()).index((layer, nets[name][int(layer)])) // 2
        assert_close(found.values[name, "direction", layer], own["direction", layer])
        assert_close(found.values["auc"][row], own["auc"][place])
    assert found.dims["critic", "direction", "3"] == ("3.unit",)


def test_labels_are_turned_within_trajectories_and_sides_of_a_contrast_swapped():
    groups, when = torch.arange(8).repeat_interleave(10), torch.arange(80) % 10
    td = td_of(input=torch.randn(80, 3), label=when < 5, episode=groups % 2 > 0)
    td["input"][:, 0] += 3 * td["label"]
    turned = measured(Cav("", "label"), nn.Identity(), td, groups=groups, ordered=True)
    assert turned["p_value"].item() == 1 / 20
    assert turned["null"].max() < turned["accuracy"]
    slow = measured(Cav("", "episode"), nn.Identity(), td, groups=groups, ordered=True)
    assert slow["null"].isnan().all()
    assert slow["null_reason"].tolist() == [4]
    unordered = measured(Cav("", "label"), nn.Identity(), td, groups=groups)
    assert unordered["null"].isnan().all()
    assert unordered["null_reason"].tolist() == [2]
    assert unordered["auc"].isfinite().all()
    contrast = TensorDict(
        {("positive", "input"): torch.randn(50, 3) + 2, ("negative", "input"): torch.randn(50, 3)}, 50
    )
    found = measured(Cav(""), nn.Identity(), contrast)
    assert found["p_value"].item() == 1 / 20
    assert found["null"].max() < 0.8
    none = measured(Cav("", nulls=0), nn.Identity(), contrast)
    assert none["null"].shape == (1, 0)
    assert none["null_reason"].tolist() == [3]
    assert none["p_value"].isnan().all()


def test_a_concept_that_means_nothing_is_significant_as_often_as_it_should_be():
    g, low = torch.Generator().manual_seed(3), 0
    for _ in range(60):
        td = td_of(input=torch.randn(60, 4, generator=g), label=torch.rand(60, generator=g) > 0.5)
        low += (
            measured(Cav("", "label", cav="mean-difference"), nn.Identity(), td, generator=g)["p_value"].item() <= 0.05
        )
    assert low <= 9  # 3 are expected; more than 9 come with a chance below 1 in 1,000
