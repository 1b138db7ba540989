"""Objectives against torch's distributions and losses; which networks they mean, and what of the batch they hold."""

import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import distributions as dist
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tdhook_train.attribution import InputXGradient, IntegratedGradients, Saliency
from tdhook_train.errors import KeyMissingError, SettingsError, TargetError
from tdhook_train.latent import ActivationPatching
from tdhook_train.ops.objectives import (
    Kl,
    LogitDifference,
    LogitGap,
    LogProb,
    NegativeLoss,
    NormalLogProb,
    TanhNormalLogProb,
)
from tdhook_train.ops.targets import given_by, label_of, refuse_unknown

OBJECTIVES = (
    LogProb(),
    NormalLogProb(),
    TanhNormalLogProb(),
    LogitDifference(3, "label"),
    LogitGap("label"),
    Kl(),
    NegativeLoss(truth=["next", "label"], output=("out", "logits")),
)


def batch(rows=6):
    g = torch.Generator().manual_seed(0)
    logits, other, loc = (torch.randn(rows, n, generator=g) for n in (4, 4, 2))
    return TensorDict(
        {
            "logits": logits,
            "reference": {"logits": other},
            "loc": loc,
            "scale": torch.rand(rows, 2, generator=g) + 0.1,
            "label": torch.arange(rows) % 4,
            "other": (torch.arange(rows) + 1) % 4,
            "value": torch.randn(rows, 1, generator=g),
            "paid": torch.randn(rows, generator=g),
            "moves": torch.rand(rows, 2, generator=g) * 1.8 - 0.9,
        },
        [rows],
    )


def test_the_log_probability_of_an_action_by_its_number_or_by_ones():
    td = batch()
    expected = dist.Categorical(logits=td["logits"]).log_prob(td["label"])
    td["column"], td["ones"] = td["label"][:, None], F.one_hot(td["label"], 4)
    td["true"] = td["ones"].bool()
    for key in ("label", "column", "ones", "true"):
        assert_close(LogProb(action=key)(td), expected)


def test_the_log_density_of_continuous_actions():
    td = batch()
    normal = dist.Normal(td["loc"], td["scale"])
    assert_close(NormalLogProb(action="moves")(td), normal.log_prob(td["moves"]).sum(1))
    squashed = dist.TransformedDistribution(normal, [dist.transforms.TanhTransform()])
    found = TanhNormalLogProb(action="moves")(td)
    assert_close(found, squashed.log_prob(td["moves"]).sum(1), atol=1e-4, rtol=1e-5)  # float32: atanh near the ends
    td["moves"] = torch.ones_like(td["moves"])
    assert TanhNormalLogProb(action="moves")(td).isfinite().all()


def test_differences_of_logits_by_number_and_by_key():
    td, row = batch(), torch.arange(6)
    logits = td["logits"]
    assert_close(LogitDifference(1, 3)(td), logits[:, 1] - logits[:, 3])
    assert_close(LogitDifference("label", "other")(td), logits[row, td["label"]] - logits[row, td["other"]])
    assert_close(LogitDifference("label", 0)(td), logits[row, td["label"]] - logits[:, 0])


def test_the_gap_between_the_chosen_logit_and_the_best_other():
    td = batch()
    pairs = zip(td["logits"].tolist(), td["label"].tolist(), strict=True)
    expected = [row.pop(chosen) - max(row) for row, chosen in pairs]
    td["ones"] = F.one_hot(td["label"], 4)
    td["true"] = td["ones"].bool()
    for key in ("label", "ones", "true"):
        assert_close(LogitGap(key)(td), torch.tensor(expected))
    td["greedy"] = td["logits"].argmax(-1)
    assert (LogitGap("greedy")(td) > 0).all()
    with pytest.raises(TargetError, match="has one action"):
        LogitGap("label")(td.update({"logits": td["logits"][:, :1]}))


def test_divergence_and_losses():
    td = batch()
    known, now = (dist.Categorical(logits=logits) for logits in (td["reference", "logits"], td["logits"]))
    assert_close(Kl()(td), dist.kl_divergence(known, now))
    assert_close(Kl(reference="logits")(td), torch.zeros(6), atol=1e-6, rtol=0)
    assert_close(NegativeLoss()(td), -F.cross_entropy(td["logits"], td["label"], reduction="none"))
    loss = NegativeLoss(truth="paid", output="value", loss="squared_error")
    assert_close(loss(td), -((td["value"][:, 0] - td["paid"]) ** 2))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=label_of)
def test_they_pickle_compare_and_are_in_settings(objective):
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert hash(objective) == hash(pickle.loads(pickle.dumps(objective)))
    shown = Saliency(targets=[objective]).settings()["targets"][0]
    assert shown["objective"] == type(objective).__name__
    assert pickle.loads(pickle.dumps(Saliency(targets=objective))) == Saliency(targets=objective)


def test_their_names():
    assert [label_of(objective) for objective in OBJECTIVES] == [
        "log_prob(action)",
        "normal_log_prob(action)",
        "tanh_normal_log_prob(action)",
        "logit_difference(3, label)",
        "logit_gap(label)",
        "kl(reference.logits)",
        "negative_loss(next.label)",
    ]


def test_networks_that_lack_what_they_read_are_left_out():
    targets = {label_of(one): one for one in OBJECTIVES}
    assert set(given_by(targets, ["logits"])) == {
        "log_prob(action)",
        "logit_difference(3, label)",
        "logit_gap(label)",
        "kl(reference.logits)",
    }
    assert set(given_by(targets, ["loc"])) == set()
    assert set(given_by(targets, ["loc", "scale"])) == {"normal_log_prob(action)", "tanh_normal_log_prob(action)"}
    assert set(given_by(targets, ["out"])) == {"negative_loss(next.label)"}
    with pytest.raises(
        TargetError, match=r"target 'kl\(reference.logits\)' reads 'logits', which no network gives out"
    ):
        refuse_unknown(Kl(), {"value": ["state_value"]})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LogProb(action=("action", 0)), r"LogProb needs action as a key, got \('action', 0\)"),
        (lambda: Kl(logits=3.0), "is no key"),
        (lambda: LogitDifference(2, 2), "needs two classes, got 2 twice"),
        (lambda: NegativeLoss(loss="mse"), "loss='mse' is none of 'cross_entropy', 'squared_error'"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, said):
    with pytest.raises(SettingsError, match=said):
        make()


def test_what_the_batch_holds_must_fit():
    td = batch()
    with pytest.raises(TargetError, match=r"'paid' is torch\.float32"):
        LogProb(action="paid")(td)
    with pytest.raises(TargetError, match="there are classes 0 to 3, not 4"):
        LogitDifference(4, 0)(td)
    td["label"] += 1
    with pytest.raises(TargetError, match="'label' has classes beyond 0 to 3"):
        NegativeLoss()(td)
    with pytest.raises(KeyMissingError, match="'action' is not in the batch"):
        LogProb()(td)


class Greedy(nn.Module):
    def forward(self, logits):
        return F.one_hot(logits.argmax(-1), 4)


def actor():
    torch.manual_seed(0)
    scores = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    return TensorDictSequential(
        TensorDictModule(scores, ["observation"], ["logits"]), TensorDictModule(Greedy(), ["logits"], ["action"])
    )


def test_the_action_stays_along_a_path_where_the_network_gives_it_out():
    model, x = actor(), torch.randn(5, 3)
    td = TensorDict(observation=x, batch_size=[5])
    with IntegratedGradients(targets=LogProb()).prepare(model) as hooked:
        out = hooked(td)
    row, chosen = torch.arange(5), model(td.clone())["logits"].argmax(-1)
    logits = lambda x: model(TensorDict(observation=x, batch_size=[5]))["logits"].log_softmax(-1)  # noqa: E731
    rise = (logits(x) - logits(torch.zeros_like(x)))[row, chosen].detach()
    assert_close(out["attr", "observation"].sum(1), rise, atol=1e-5, rtol=0)


def test_patching_keeps_the_action_of_the_base_state():
    model, x = actor(), torch.randn(6, 3)
    td = TensorDict(observation=x, batch_size=[6])
    with ActivationPatching(layers="module.0.module.2", targets=LogProb()).prepare(model) as hooked:
        effect = hooked(td)["effect"][0, 0]
    logits = model(td.clone())["logits"].log_softmax(-1).detach()
    row, chosen = torch.arange(6), logits.argmax(-1)
    assert_close(effect, (logits.roll(3, 0)[row, chosen] - logits[row, chosen]).abs().mean())


def test_a_gradient_in_closed_form():
    # ∂ log softmax(W x)_a / ∂x = W_a - Σ p W
    model, x = nn.Linear(3, 4), torch.randn(5, 3)
    label = torch.arange(5) % 4
    method = InputXGradient(targets=[LogProb(action="label", logits="output"), NegativeLoss(output="output")])
    with method.prepare(model) as hooked:
        found = hooked(TensorDict({"input": x, "label": label}, [5]))["attr", "input"]
    weight, p = model.weight.detach(), model(x).softmax(-1).detach()
    assert_close(found[:, 0], x * (weight[label] - p @ weight))
    assert_close(found[:, 1], found[:, 0])
