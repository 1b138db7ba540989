"""TCAV: directional derivatives by hand, a linear head, concepts that mean nothing."""

import pytest
import torch
from method_cases import above_zero, batch, measured, mlp
from scipy import stats
from tensordict import TensorDict
from torch import nn
from torch.func import jacrev, vmap
from torch.testing import assert_close

from tdhook_train import latent
from tdhook_train.attribution import Tcav
from tdhook_train.errors import SettingsError

BOTH = [("output", 0), ("output", 1)]


def cav_of(h, marks):
    between = h[marks].mean(0) - h[~marks].mean(0)
    return between / between.norm()


def test_scores_are_the_shares_of_positive_derivatives():
    model, td = mlp(3, 6, 5, 2), batch(40)
    for rows, among in ((None, None), (None, lambda td: td["late"] == 1)):
        found = measured(Tcav(layers=("1", "3"), concept=above_zero, targets=BOTH, rows=rows, among=among), model, td)
        for i, start in enumerate((2, 4)):
            h = model[:start](td["input"]).detach()
            slopes = vmap(jacrev(model[start:]))(h).detach() @ cav_of(h, above_zero(td))
            slopes = slopes if among is None else slopes[among(td)]
            assert_close(found["score"][i], (slopes > 0).double().mean(0))
            assert_close(found["sensitivity"][i].float(), slopes.mean(0))


def test_a_linear_head_gives_0_or_1():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    found = measured(Tcav(layers="1", concept=above_zero), model, batch(60))
    assert set(found["score"].flatten().tolist()) <= {0.0, 1.0}
    assert set(found["null"].flatten().tolist()) <= {0.0, 1.0}
    assert_close(found["score"], (found["sensitivity"] > 0).double())


def test_what_rises_with_the_concept_is_told_from_what_does_not():
    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            h = self.inner(x)
            waves = (3 * h[:, 1:]).sin().sum(1)
            return torch.stack([h[:, 0] + waves, waves, waves - h[:, 0]], 1)

    td = TensorDict(input=torch.randn(400, 8), batch_size=[400])
    found = measured(Tcav(layers="inner", concept=lambda td: td["input"][:, 0] > 0), Bent(), td)
    (rises, neither, falls), p = found["score"][0].tolist(), found["p_value"][0].tolist()
    assert rises > 0.95 > 0.65 > neither > 0.35 > 0.05 > falls
    assert p[1] > 0.05 > 1e-4 > max(p[0], p[2])


def test_the_test_is_students_of_one_value_against_the_others():
    found = measured(Tcav(layers=("1", "3"), concept=above_zero), mlp(3, 6, 5, 2), batch(40))
    for score, null, p in zip(*(found[k].flatten(0, 1) for k in ("score", "null", "p_value")), strict=True):
        # twice the value, and the same spread around it, would be two samples: with one, the spread is of the others
        low, high = stats.t.interval(1 - p.item(), 49, null.mean().item(), null.std().item() * (1 + 1 / 50) ** 0.5)
        assert min(abs(score - low), abs(score - high)) < 1e-9


@pytest.mark.parametrize("cav", ["mean-difference", "logistic"])
def test_a_concept_that_means_nothing_is_significant_as_often_as_it_should_be(cav):
    model = mlp(4, 8, 8, 1)
    for part in model:
        if isinstance(part, nn.Linear):
            part.weight.data.mul_(3)
    td = TensorDict(input=torch.randn(60, 4), batch_size=[60])
    method = Tcav(layers="1", targets=("output", 0), concept="label", cav=cav, nulls=20)
    low = []
    for _ in range(60):
        td["label"] = torch.rand(60) > 0.5
        low.append(measured(method, model, td)["p_value"].item() < 0.05)
    # 3 of 60 are expected; more than 9 come with a chance below 1 in 1,000
    assert sum(low) <= 9


def test_channels_are_averaged_for_the_direction_and_added_up_for_the_derivative():
    model, x = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 6), nn.Tanh()), None
    x, marks = torch.randn(30, 1, 6, 6), torch.rand(30) > 0.5
    td = TensorDict({"input": x, "label": marks}, [30])
    found = measured(Tcav(layers="1", concept="label"), model, td)
    h = model[:2](x).detach()
    cav = cav_of(h.mean((2, 3)), marks)
    slopes = torch.einsum("rtchw,c->rt", vmap(jacrev(lambda h: model[2:](h[None])[0]))(h), cav).detach()
    assert_close(found["score"][0], (slopes > 0).double().mean(0))
    assert_close(found["sensitivity"][0].float(), slopes.mean(0))


def test_a_concept_without_rows_is_refused():
    with pytest.raises(SettingsError, match="needs rows that show it and rows that do not; 0 of 24 do"):
        measured(Tcav(concept=lambda td: td["input"][:, 0] > 99), mlp(3, 5, 2), batch())


def test_passes_change_nothing():
    model, td = mlp(3, 6, 5, 2), batch(40)
    whole, cut = (measured(Tcav(layers="1", concept=above_zero, max_bytes=size), model, td) for size in (None, 1))
    for key in Tcav.writes:
        assert_close(whole[key], cut[key])


def test_it_is_found_beside_attributions_and_beside_what_layers_know():
    assert latent.Tcav is Tcav
