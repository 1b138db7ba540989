"""Patchings in an observed training: rows of both networks, equal to the same by hand, and no trace of it."""

import pytest
import tiny
import torch
from test_every_attribution_in_a_run import STEPS, trained
from torch.testing import assert_close

from tdhook_train import ArtifactBuffer
from tdhook_train.circuits import RelP
from tdhook_train.latent import ActivationPatching, AttributionPatching

TARGETS = ["loc", "state_value"]
METHODS = {
    "exact": ActivationPatching(targets=TARGETS, pairs=8),
    "gradients": AttributionPatching(targets=TARGETS, pairs=8),
    "relevance": RelP(targets=TARGETS, pairs=8),
}


def test_the_training_ends_in_the_same_bits(tmp_path):
    with_, without = trained(METHODS, tmp_path / "run"), trained({}, tmp_path)
    for one, other in zip(with_[:2], without[:2], strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_those_by_hand(tmp_path, name):
    *_, data = trained({name: METHODS[name]}, tmp_path)
    rows = ArtifactBuffer.open(tmp_path)[name]
    assert len(rows.steps) >= STEPS
    torch.manual_seed(0)
    fresh = tiny.stochastic_actor()  # the weights that it began with
    batch = data.reshape(-1).select("observation")
    with type(METHODS[name])(targets="loc", pairs=8).prepare(fresh.module[0]) as hooked:
        by_hand = hooked(batch)
    row, compared = rows.at(0), 0
    for key in set(by_hand.keys()) & {"effect", "unit_effect", "normalised", "unit_normalised", "gap", "agreement"}:
        assert_close(row[key][:4, ..., 0], by_hand[key][..., 0], equal_nan=True)  # the actor's layers, and its target
        assert row[key][4:, ..., 0].isnan().all()
        assert row[key][4:, ..., 1].isfinite().any()
        compared += 1
    for key in set(by_hand.keys()) & {"agreement_overall", "top_layer", "top_part", "top_estimate", "top_exact"}:
        assert_close(row["actor_network", key].flatten(), by_hand[key].flatten())
        compared += 1
    assert compared == (5 if name == "exact" else 11)
