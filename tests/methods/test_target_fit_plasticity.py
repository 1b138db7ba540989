"""Learning random targets as well as a fresh network: against Adam on one copy after the other."""

import copy
from types import SimpleNamespace

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal

from tdhook_train import At, HookedModel, Observer, ProbeSet
from tdhook_train.errors import NetworkError, TargetError
from tdhook_train.health import TargetFitPlasticity, fitting, target_fit_plasticity
from tdhook_train.health.fitting import Member, fitted

SHORT = {"steps": 40, "draws": 4, "rows": 64, "lr": 1e-2}


def data(n=64, width=4):
    return TensorDict({"input": torch.randn(n, width)}, [n])


def relu(*widths):
    return mlp(*widths, activation=nn.ReLU)


@pytest.mark.parametrize("way", ["together", "apart"])
def test_every_member_is_trained_as_if_it_were_alone(way, monkeypatch):
    nets, td, targets = [mlp(4, 6, 2) for _ in range(3)], data(20), torch.randn(3, 20, 2)
    if way == "apart":
        monkeypatch.setattr(fitting, "_together", lambda *_: None)
    else:
        monkeypatch.setattr(fitting, "_apart", None)
    members = [Member(HookedModel(net), copy.deepcopy(net).requires_grad_(False), "output") for net in nets]
    found = fitted(members, td, targets, 15, 0.01)
    for net, target, loss in zip(nets, targets, found, strict=True):
        alone = copy.deepcopy(net)
        optimizer = torch.optim.Adam(alone.parameters(), 0.01)
        for _ in range(15):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(alone(td["input"]), target).backward()
            optimizer.step()
        expected = torch.nn.functional.mse_loss(alone(td["input"]), target)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)


def test_a_fresh_network_gives_about_1_and_one_of_mostly_dead_units_far_more():
    net, td = relu(4, 32, 32, 1), data()
    out = measured(TargetFitPlasticity(**SHORT), net, td)
    assert 0.7 < float(out["target_fit"]) < 1.4
    assert int(out["target_fit_reason"]) == 0
    assert (out["target_fit_loss_fresh"] < 0.6).all()  # it has learnt: guessing the mean gives 1
    for layer in (0, 2):
        with torch.no_grad():
            net[layer].bias[:28] = -100.0  # 87 %
    dead = measured(TargetFitPlasticity(**SHORT), net, td)
    assert float(dead["target_fit"]) > 2
    # the fresh ones and the targets are those of before
    assert torch.equal(dead["target_fit_loss_fresh"], out["target_fit_loss_fresh"])
    expected = float(dead["target_fit_loss"].sum() / dead["target_fit_loss_fresh"].sum())
    assert float(dead["target_fit"]) == pytest.approx(expected)


def test_a_network_that_can_learn_nothing_is_left_at_the_variance_of_the_targets():
    net, td = relu(4, 8, 1), data()
    with torch.no_grad():
        net[0].bias -= 100.0
    out = measured(TargetFitPlasticity(**SHORT), net, td)
    assert out["target_fit_loss"].tolist() == pytest.approx([1.0] * 4, rel=1e-4)


class Captured(Exception):
    pass


def captured(method, model, td, monkeypatch, **known):
    """What is trained: members, inputs and targets."""

    def instead(*given):
        raise Captured(SimpleNamespace(**dict(zip(("members", "batch", "targets", "steps", "lr"), given, strict=True))))

    monkeypatch.setattr(target_fit_plasticity, "fitted", instead)
    with pytest.raises(Captured) as caught:
        measured(method, model, td, **known)
    return caught.value.args[0]


def test_what_is_trained_and_towards_what(monkeypatch):
    net, td = relu(4, 8, 3), data(100)
    with torch.no_grad():
        net[2].bias += 1000.0
    given = captured(TargetFitPlasticity(draws=3, steps=7, lr=0.5, rows=10), net, td, monkeypatch)
    x = td["input"][[0, 10, 20, 30, 40, 50, 60, 70, 80, 90]]
    assert torch.equal(given.batch["input"], x)
    assert (given.steps, given.lr, len(given.members), given.targets.shape) == (7, 0.5, 6, (6, 10, 3))
    now = torch.stack([member(given.batch) for member in given.members])
    for output in now[:3]:
        torch.testing.assert_close(output, net(x).detach())
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(now[2:]) for b in now[2:][:i])  # each is another
    for start, target in zip(now, given.targets, strict=True):
        torch.testing.assert_close(target.mean(0), start.mean(0), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(target.var(0, correction=0), torch.ones(3), rtol=1e-3, atol=0)
    goals = given.targets - now.mean(1, keepdim=True)
    torch.testing.assert_close(goals[:3], goals[3:], rtol=1e-3, atol=1e-3)  # both learn the same
    assert (goals[0] - goals[1]).abs().max() > 0.1


def test_the_network_at_initialisation_may_be_the_fresh_one(monkeypatch):
    net, td, first = relu(4, 8, 1), data(20), relu(4, 8, 1)
    method = TargetFitPlasticity(draws=2, fresh="initial")
    given = captured(method, net, td, monkeypatch, initial=HookedModel(first))
    for member in given.members[2:]:
        torch.testing.assert_close(member(given.batch), first(td["input"]).detach())
    out = measured(method, net, td)
    assert (int(out["target_fit_reason"]), float(out["target_fit"])) == (3, pytest.approx(torch.nan, nan_ok=True))


def test_what_cannot_be_measured_says_why():
    net, td = relu(4, 8, 1), data(20)
    with torch.no_grad():
        net[2].bias[:] = torch.nan
    out = measured(TargetFitPlasticity(**SHORT), net, td)
    assert int(out["target_fit_reason"]) == 1
    same = TensorDict({"input": torch.ones(20, 4)}, [20])
    for given in (same, same[:1]):
        out = measured(TargetFitPlasticity(**SHORT), relu(4, 8, 1), given)
        assert int(out["target_fit_reason"]) == 2
        assert out["target_fit"].isnan()
        assert out["target_fit_loss"].isnan().all()


class Scaled(nn.Module):
    """Has a weight of its own that no part knows how to draw."""

    def __init__(self, used):
        super().__init__()
        self.scale, self.inner, self.used = nn.Parameter(torch.ones(3)), nn.Linear(3, 2), used

    def forward(self, x):
        return self.inner(x * self.scale if self.used else x), self.scale.expand(len(x), 3)


def test_a_weight_that_nobody_can_draw_is_an_error_where_the_output_depends_on_it():
    td, method = data(12, 3), TargetFitPlasticity(draws=1, steps=1)
    with pytest.raises(NetworkError, match=r"knows how to draw 'scale': give the module .* a reset_parameters"):
        measured(method, Scaled(used=True), td, out_keys=["loc", "scale"])
    assert int(measured(method, Scaled(used=False), td, out_keys=["loc", "scale"])["target_fit_reason"]) == 0
    normed = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)))
    with pytest.raises(NetworkError, match=r"knows how to draw '0.bias', '0.parametrizations.weight.original0?'"):
        measured(method, normed, td)
    with pytest.raises(TargetError, match="'lok' is given out by no network; did you mean 'loc'"):
        measured(TargetFitPlasticity("lok"), Scaled(used=False), td, out_keys=["loc", "scale"])


def actor():
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4), NormalParamExtractor())
    body = TensorDictModule(net, ["observation"], ["loc", "scale"])
    return ProbabilisticActor(body, ["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True)


def test_of_a_policy_what_comes_after_the_output_is_left_out_and_all_run_as_one_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "_apart", None)
    td = TensorDict({"observation": torch.randn(30, 2)}, [30])
    with Observer({"fit": TargetFitPlasticity(**SHORT)}, when=At(0), into=tmp_path, on=ProbeSet(td)) as observer:
        observer.step(actor(), step=0)
        row = observer.buffer["fit"].at(0)
    assert 0.5 < float(row["target_fit"]) < 2
    scale = measured(TargetFitPlasticity("scale", **SHORT), actor(), td)
    assert int(scale["target_fit_reason"]) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_recurrent_layers_train_one_after_the_other_in_any_mode(mode):
    class Last(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0][:, -1]

    td = TensorDict({"input": torch.randn(10, 5, 3)}, [10])
    with mode():
        out = measured(TargetFitPlasticity(draws=2, steps=3), Last(3, 4, batch_first=True), td)
    assert int(out["target_fit_reason"]) == 0
    assert 0.5 < float(out["target_fit"]) < 2
