"""Attributions and their metrics in an observed training: rows of all networks, equal to the same by hand."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from torch.testing import assert_close

from tdhook_train import ArtifactBuffer, At, Every, Observer
from tdhook_train.attribution import LRP, FeatureAblation, InputXGradient, Saliency
from tdhook_train.metrics import Deletion, Stability
from tdhook_train.rl import ObservedLoss

STEPS = 3


def trained(methods, folder, on="batch"):
    """Train a policy and a value network for some steps; return both, and the batch."""
    torch.manual_seed(0)
    actor, critic = tiny.stochastic_actor(), tiny.rl.ValueOperator(tiny.mlp(2, 1), in_keys=["observation"])
    loss = tiny.ClipPPOLoss(actor, critic)
    data = next(iter(tiny.collector_of(actor)))
    loss.make_value_estimator(gamma=0.9)
    loss.value_estimator(data, params=loss.critic_network_params, target_params=loss.target_critic_network_params)
    optimizer = torch.optim.Adam(loss.parameters(), 0.01)
    with Observer(methods, when=At(0) | Every(optim_steps=1), into=folder) if methods else nullcontext() as observer:
        observed = ObservedLoss(loss, observer, optimizer) if methods else loss
        for _ in range(STEPS):
            values = observed(data)
            sum(value for key, value in values.items() if key.startswith("loss_")).backward()
            optimizer.step()
            optimizer.zero_grad()
    return actor, critic, data


METHODS = {
    "layer": Saliency(layers=nn.Linear, reduction="mean_abs"),
    "lrp": LRP(targets=["loc", "state_value"], rows=6),
    "ablation": FeatureAblation(targets=["loc", "state_value"], groups={"first": [0], "second": [1]}, rows=6),
    "input": InputXGradient(targets=["loc", "state_value"], rows=6),
    "deletion": Deletion(of=InputXGradient(targets=["loc", "state_value"], rows=6)),
    "stability": Stability(of=InputXGradient(targets=["loc", "state_value"], rows=6)),
}


def test_the_training_ends_in_the_same_bits(tmp_path):
    with_, without = trained(METHODS, tmp_path / "run"), trained({}, tmp_path)
    for one, other in zip(with_[:2], without[:2], strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_rows_of_both_networks(tmp_path):
    trained(METHODS, tmp_path)
    buffer = ArtifactBuffer.open(tmp_path)
    for name in METHODS:
        assert buffer[name].steps.tolist()[0] == 0
        keys = [key for key in buffer[name].schema.columns if key[0] in ("actor_network", "critic_network")]
        assert {key[0] for key in keys} == {"actor_network", "critic_network"}
        for key in keys:
            if name != "stability":  # which knows nothing before its second tick
                assert buffer[name].series(key).isfinite().all()


@pytest.mark.parametrize("name", ["layer", "lrp", "ablation", "input"])
def test_rows_are_those_by_hand(tmp_path, name):
    *_, data = trained({name: METHODS[name]}, tmp_path)
    torch.manual_seed(0)
    row = ArtifactBuffer.open(tmp_path)[name].at(0)
    fresh = tiny.stochastic_actor()  # the weights that it began with
    rows = data.reshape(-1).select("observation")
    method = METHODS[name] if name == "layer" else replace(METHODS[name], targets=["loc"])
    with method.prepare(fresh.module[0]) as hooked:
        by_hand = dict(hooked(rows)["attr"].items(True, True))
    assert by_hand
    for key, value in by_hand.items():
        within = f"module.0.{key}" if name == "layer" else key
        assert_close(row["actor_network", "attr", within].reshape(value.shape), value)
