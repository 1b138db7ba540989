"""Churn between ticks: against scipy, torch's distributions and plain counting."""

import copy

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform
from torchrl.modules import NormalParamExtractor, QValueActor, ValueOperator
from torchrl.objectives import ClipPPOLoss

from tdhook_train import At, Every, HookedModel, Observer, ProbeSet
from tdhook_train.errors import NetworkError, SettingsError, TargetError
from tdhook_train.health import Churn
from tdhook_train.method import Part, Seen
from tdhook_train.ops.divergence import kl


class Gives(nn.Module):
    """A network whose outputs the test chooses."""

    def __init__(self, **values):
        super().__init__()
        self.values, self.layer = values, nn.Identity()

    def forward(self, x):
        return tuple(self.layer(value) for value in self.values.values())


def tick(method, values, previous=None, x=None):
    n = len(next(iter(values.values())))
    td = TensorDict({"input": torch.arange(n)[:, None].float() if x is None else x}, [n])
    return measured(method, Gives(**values), td, out_keys=list(values), previous=previous)


DEFAULT = Churn()


def ticks(before, after, method=DEFAULT, **known):
    return tick(method, after, tick(method, before), **known)


def test_a_policy_over_actions_against_scipy():
    one, two = torch.randn(50, 4) * 2, torch.randn(50, 4) * 2
    out = ticks({"logits": one}, {"logits": two})
    p, q = (scipy.special.softmax(v.double().numpy(), 1) for v in (one, two))
    assert float(out["churn_kl"]) == pytest.approx(scipy.stats.entropy(p, q, axis=1).mean())
    assert float(out["churn_total_variation"]) == pytest.approx(np.abs(p - q).sum(1).mean() / 2)
    assert float(out["churn_flips"]) == pytest.approx(
        np.mean([a.argmax() != b.argmax() for a, b in zip(p, q, strict=True)])
    )
    assert int(out["churn_policy_reason"]) == 0
    assert 0 < float(out["churn_flips"]) < 1
    back = ticks({"logits": two}, {"logits": one})
    assert float(back["churn_kl"]) == pytest.approx(scipy.stats.entropy(q, p, axis=1).mean())
    assert float(back["churn_kl"]) != pytest.approx(float(out["churn_kl"]), rel=1e-3)
    assert "churn_value" not in out


def test_a_normal_policy_against_torchs_closed_form_with_and_without_a_tanh():
    loc, other = torch.randn(30, 3), torch.randn(30, 3)
    scale, spread = torch.rand(30, 3) + 0.2, torch.rand(30, 3) + 0.2
    out = ticks({"loc": loc, "scale": scale}, {"loc": other, "scale": spread})
    one, two = (Independent(Normal(m.double(), s.double()), 1) for m, s in ((loc, scale), (other, spread)))
    assert float(out["churn_kl"]) == pytest.approx(float(kl_divergence(one, two).mean()))
    assert set(out.keys()) & set(Churn.shown) == {"churn_kl"}
    squashed, moved = (TransformedDistribution(d, TanhTransform()) for d in (one, two))
    assert float(out["churn_kl"]) == pytest.approx(float(kl_divergence(squashed, moved).mean()))


def test_values_by_their_standard_deviation_before():
    one, two = torch.randn(40, 1) * 3 + 100, torch.randn(40, 1)
    out = ticks({"state_value": one}, {"state_value": two})
    expected = np.abs((two - one).double().numpy()).mean() / np.std(one.double().numpy())
    assert float(out["churn_value"]) == pytest.approx(expected)
    assert "churn_kl" not in out


def test_action_values_flip_and_are_no_policy():
    one, two = torch.randn(40, 3), torch.randn(40, 3)
    values = {"action_value": one, "chosen_action_value": one.amax(1, keepdim=True)}
    after = {"action_value": two, "chosen_action_value": two.amax(1, keepdim=True)}
    out = ticks(values, after)
    assert float(out["churn_flips"]) == pytest.approx(float((one.argmax(1) != two.argmax(1)).double().mean()))
    assert set(out.keys()) & set(Churn.shown) == {"churn_flips", "churn_value"}


def test_the_same_network_gives_0_and_the_first_tick_nothing():
    model, td = mlp(3, 5, 2), TensorDict({"input": torch.randn(20, 3)}, [20])
    method = Churn(logits="output", values=("output", 0))
    first = measured(method, model, td)
    for key in Churn.shown:
        assert first[key].isnan()
    assert [int(first[f"churn_{kind}_reason"]) for kind in ("policy", "value")] == [1, 1]
    again = measured(method, model, td, previous=first)
    assert [float(again[key]) for key in Churn.shown] == [0.0] * 4
    assert [int(again[f"churn_{kind}_reason"]) for kind in ("policy", "value")] == [0, 0]
    elsewhere = measured(method, model, TensorDict({"input": td["input"] + 1}, [20]), previous=first)
    assert int(elsewhere["churn_policy_reason"]) == 1
    assert elsewhere["churn_kl"].isnan()


def test_at_most_so_many_states_spread_evenly():
    one, two = torch.randn(10, 4), torch.randn(10, 4)
    some, chosen = ticks({"logits": one}, {"logits": two}, Churn(rows=5)), [0, 2, 4, 6, 8]
    fewer = ticks({"logits": one[chosen]}, {"logits": two[chosen]})
    assert some["churn_outputs", "logits"].shape == (5, 4)
    for key in ("churn_kl", "churn_flips", "churn_total_variation"):
        assert float(some[key]) == pytest.approx(float(fewer[key]))


def test_an_action_that_is_ruled_out_stays_so_or_makes_it_infinite():
    one, two = torch.randn(20, 4), torch.randn(20, 4)
    one[:, 3], two[:, 3] = -torch.inf, -torch.inf
    masked, without = ticks({"logits": one}, {"logits": two}), ticks({"logits": one[:, :3]}, {"logits": two[:, :3]})
    for key in ("churn_kl", "churn_flips", "churn_total_variation"):
        assert float(masked[key]) == pytest.approx(float(without[key]))
    assert int(masked["churn_policy_reason"]) == 0
    two[4, 1] = -torch.inf
    assert float(ticks({"logits": one}, {"logits": two})["churn_kl"]) == torch.inf
    freed = kl(two.double(), one.double())
    assert freed.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("when", ["before", "after"])
def test_outputs_that_are_not_finite_say_so_and_leave_the_others_alone(bad, when):
    good = {"logits": torch.randn(10, 3), "state_value": torch.randn(10, 1)}
    for key, kind, other in (("logits", "policy", "value"), ("state_value", "value", "policy")):
        spoilt = {name: value.clone() for name, value in good.items()}
        spoilt[key][3] = bad
        out = ticks(spoilt, good) if when == "before" else ticks(good, spoilt)
        assert [int(out[f"churn_{one}_reason"]) for one in (kind, other)] == [2, 0]
        assert out["churn_kl" if kind == "policy" else "churn_value"].isnan()
        assert float(out["churn_value" if kind == "policy" else "churn_kl"]) == 0


def test_values_that_were_all_the_same_have_no_scale():
    same = torch.full((9, 1), 0.1) * (1 + torch.finfo(torch.float32).eps * (torch.arange(9)[:, None] % 2))
    assert len(same.unique()) == 2  # but for the last bit
    out = ticks({"state_value": same}, {"state_value": torch.randn(9, 1)})
    assert out["churn_value"].isnan()
    assert int(out["churn_value_reason"]) == 3


def test_outputs_are_named_or_found_and_what_no_network_gives_is_refused():
    given = {"a": torch.randn(8, 3), "b": torch.randn(8, 1)}
    out = tick(Churn(logits="a", values="b"), given)
    assert set(out["churn_outputs"].keys()) == {"logits", "values"}
    assert torch.equal(out["churn_outputs", "values"], given["b"])
    with pytest.raises(TargetError, match="'c' is given out by no network"):
        tick(Churn(logits="a", values="c"), given)
    with pytest.raises(SettingsError, match="Churn needs loc and scale together"):
        Churn(scale="s")


def ppo():
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2), NormalParamExtractor())
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=Normal),
    )
    critic = ValueOperator(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)), in_keys=["observation"])
    return ClipPPOLoss(actor, critic)


def test_through_a_training_each_network_is_compared_with_itself_at_the_tick_before(tmp_path):
    loss, td = ppo(), TensorDict({"observation": torch.randn(30, 2)}, [30])
    observer = Observer({"churn": Churn()}, when=At(0) | Every(optim_steps=1), into=tmp_path, on=ProbeSet(td))
    kept = []
    with observer:
        for step in range(3):
            observer.step(loss, step=step)
            kept.append((copy.deepcopy(loss.actor_network), copy.deepcopy(loss.critic_network)))
            with torch.no_grad():
                for p in loss.parameters():
                    p += 0.1 * torch.randn_like(p)
        rows = observer.buffer["churn"]
        kls = [float(row["actor_network", "churn_kl"]) for row in rows]
        values = [float(row["critic_network", "churn_value"]) for row in rows]
        reasons = [int(row["actor_network", "churn_policy_reason"]) for row in rows]
    assert reasons == [1, 0, 0]
    assert np.isnan([kls[0], values[0]]).all()
    for step in (1, 2):
        (actor, critic), (moved, after) = kept[step - 1], kept[step]
        one, two = (a.get_dist(td.clone()) for a in (actor, moved))
        assert kls[step] == pytest.approx(float(kl_divergence(one, two).sum(-1).mean().detach()), rel=1e-4)
        v, w = (c(td.clone())["state_value"].detach() for c in (critic, after))
        assert values[step] == pytest.approx(float((w - v).abs().mean() / v.std(correction=0)), rel=1e-4)


def test_a_network_with_nothing_to_compare_is_left_out():
    actor = QValueActor(nn.Linear(2, 3), in_keys=["observation"], action_space="one-hot")
    td = TensorDict({"observation": torch.randn(6, 2)}, [6])
    assert set(measured(Churn(), actor, td)["churn_outputs"].keys()) == {"action_values", "values"}
    parts = {"": Part(Seen(td), HookedModel(nn.Linear(2, 3)))}
    with pytest.raises(NetworkError, match="nothing to measure"):
        Churn().across(parts)
