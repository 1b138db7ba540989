"""Gradients of single states and of their mean: against autograd, one row and one target after the other."""

import copy

import pytest
import torch
from method_cases import batch, measured, mlp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss

from tdhook_train import At, Every, Observer, ProbeSet
from tdhook_train.errors import TargetError
from tdhook_train.health import GradientCovariance, GradientNorms
from tdhook_train.health.gradients import Weighted
from tdhook_train.ops.objectives import NegativeLoss


def loop(model, x, target=lambda out: out[:, 0], layers=None):
    """Gradients of each row ``[row, weight]``, by layer."""
    twin = copy.deepcopy(model).eval()
    layers = {name: part for name, part in twin.named_modules() if list(part.parameters(recurse=False))}
    found = {name: [] for name in layers}
    for i in range(len(x)):
        value = target(twin(x[i : i + 1]))[0]
        for name, part in layers.items():
            grads = torch.autograd.grad(value, list(part.parameters(recurse=False)), retain_graph=True)
            found[name].append(torch.cat([g.flatten() for g in grads]).double())
    return {name: torch.stack(rows) for name, rows in found.items()}


def by_hand(grads):
    """Cosine matrix, its mean off the diagonal and the share below 0, in plain loops."""
    n = len(grads)
    cosine = [[float(a @ b / (a.norm() * b.norm())) for b in grads] for a in grads]
    pairs = [cosine[i][j] for i in range(n) for j in range(n) if i != j]
    return cosine, sum(pairs) / len(pairs), sum(p < 0 for p in pairs) / len(pairs)


@pytest.fixture(params=["at once", "one by one"])
def way(request, monkeypatch):
    if request.param == "at once":
        monkeypatch.setattr(Weighted, "_one_by_one", None)
    else:

        def refused(self, rows):
            raise RuntimeError

        monkeypatch.setattr(Weighted, "_at_once", refused)
    return request.param


@pytest.mark.parametrize("max_bytes", [2**28, 10_000, 1])
def test_the_cosines_are_those_of_gradients_one_by_one(way, max_bytes):
    model, td = mlp(3, 7, 4, 2), batch(9)
    out = measured(GradientCovariance([("output", 1), ("output", 0)], max_bytes=max_bytes), model, td)
    for place, feature in enumerate((1, 0)):
        layers = loop(model, td["input"], lambda o, f=feature: o[:, f])
        cosine, mean, negative = by_hand(torch.cat(list(layers.values()), 1))
        torch.testing.assert_close(out["gradient_cosine"][place], torch.tensor(cosine), atol=1e-5, rtol=0)
        assert float(out["gradient_cosine_mean"][place]) == pytest.approx(mean, abs=1e-6)
        assert float(out["gradient_cosine_negative"][place]) == pytest.approx(negative)
        for i, grads in enumerate(layers.values()):
            assert float(out["sample_gradient_norm"][i, place]) == pytest.approx(
                float(grads.norm(dim=1).mean()), rel=1e-5
            )
        whole = torch.cat(list(layers.values()), 1).norm(dim=1).mean()
        assert float(out["sample_gradient_norm_pooled"][place]) == pytest.approx(float(whole), rel=1e-5)


def test_some_rows_and_some_layers(way):
    model, td = mlp(3, 7, 2), batch(20)
    out = measured(GradientCovariance(("output", 0), layers="2", rows=5), model, td)
    cosine, mean, _ = by_hand(loop(model, td["input"][::4])["2"])
    torch.testing.assert_close(out["gradient_cosine"][0], torch.tensor(cosine), atol=1e-5, rtol=0)
    assert float(out["gradient_cosine_mean"]) == pytest.approx(mean, abs=1e-6)


def test_a_loss_of_the_batch_is_differentiated(way):
    model, td = mlp(3, 7, 1), batch(8)
    method = GradientCovariance(NegativeLoss("y", "output", "squared_error"))
    out = measured(method, model, td)
    grads = []
    for i in range(8):
        loss = -(model(td["input"][i : i + 1]) - td["y"][i]).square().sum()
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    torch.testing.assert_close(out["gradient_cosine"][0], torch.tensor(by_hand(grads)[0]), atol=1e-5, rtol=0)


def test_states_that_teach_the_same_the_opposite_or_nothing():
    model = nn.Linear(2, 1, bias=False)  # the gradient of a row is the row
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, 0.0], [torch.nan, 1.0]])
    out = measured(GradientCovariance(), model, TensorDict({"input": x}, [6]))
    cosine = out["gradient_cosine"][0]
    assert cosine[0, :4].tolist() == [1.0, 1.0, -1.0, 0.0]
    assert cosine[4].isnan().all()
    assert cosine[:, 5].isnan().all()
    assert float(out["gradient_cosine_mean"]) == pytest.approx((1 - 1 + 0 - 1 + 0 + 0) / 6)
    assert float(out["gradient_cosine_negative"]) == pytest.approx(2 / 6)
    assert int(out["gradient_reason"]) == 0
    alone = measured(GradientCovariance(), model, TensorDict({"input": x[:1]}, [1]))
    nothing = measured(GradientCovariance(), model, TensorDict({"input": x[4:]}, [2]))
    for found in (alone, nothing):
        assert int(found["gradient_reason"]) == 1
        assert found["gradient_cosine_mean"].isnan()
        assert found["gradient_cosine_negative"].isnan()


def test_a_weight_that_two_layers_share_counts_once(way):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.two = nn.Linear(3, 3)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x).tanh())

    model, td = Tied(), batch(6)
    out = measured(GradientCovariance(("output", 0)), model, td)
    grads = []
    for i in range(6):
        value = model(td["input"][i : i + 1])[0, 0]
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    torch.testing.assert_close(out["gradient_cosine"][0], torch.tensor(by_hand(grads)[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_recurrent_layers_in_any_mode(mode):
    class Last(nn.GRU):
        def forward(self, x):
            return super().forward(x)[0][:, -1]

    model, td = Last(3, 4, batch_first=True), TensorDict({"input": torch.randn(5, 6, 3)}, [5])
    with mode():
        out = measured(GradientCovariance(("output", 0)), model, td)
    grads = []
    for i in range(5):
        value = model(td["input"][i : i + 1])[0, 0]
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    torch.testing.assert_close(out["gradient_cosine"][0], torch.tensor(by_hand(grads)[0]), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- of the mean


def test_the_norm_of_the_mean_gradient_and_its_turn_since_the_row_before():
    then, td = mlp(3, 5, 2), batch(12)
    now = copy.deepcopy(then)
    with torch.no_grad():
        for p in now.parameters():
            p += 0.5 * torch.randn_like(p)
    method = GradientNorms([("output", 0), ("output", 1)], rows=6)
    before = measured(method, then, td)
    assert before["gradient_turn"].isnan().all()
    out = measured(method, now, td, previous=before)
    for t in (0, 1):
        one, two = (loop(m, td["input"][::2], lambda o, t=t: o[:, t]) for m in (then, now))
        pairs = [(a.mean(0), b.mean(0)) for a, b in zip(one.values(), two.values(), strict=True)]
        pairs.append(tuple(torch.cat(side) for side in zip(*pairs, strict=True)))
        for i, (a, b) in enumerate(pairs):
            norm, turn = (
                (out[f"gradient_{what}"][i, t] if i < 2 else out[f"gradient_{what}_pooled"][t])
                for what in ("norm", "turn")
            )
            assert float(norm) == pytest.approx(float(b.norm()), rel=1e-5)
            assert float(turn) == pytest.approx(float(torch.cosine_similarity(a, b, 0)), abs=1e-5)
    again = measured(method, now, td, previous=out)
    torch.testing.assert_close(again["gradient_turn"], torch.ones(2, 2, dtype=torch.float64))


def test_a_gradient_of_0_has_no_direction():
    model, td = mlp(3, 5, 2, activation=nn.ReLU), batch(12)
    with torch.no_grad():
        model[0].bias -= 100.0  # all units are dead
    first = measured(GradientNorms(("output", 0)), model, td)
    out = measured(GradientNorms(("output", 0)), model, td, previous=first)
    assert out["gradient_norm"][0].item() == 0
    assert out["gradient_turn"][0].isnan()
    assert out["gradient_turn"][1].item() == pytest.approx(1)


def ppo():
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4), NormalParamExtractor())
    body = TensorDictModule(net, ["observation"], ["loc", "scale"])
    actor = ProbabilisticActor(body, ["loc", "scale"], distribution_class=TanhNormal)
    return ClipPPOLoss(actor, ValueOperator(nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 1)), in_keys=["observation"]))


def test_through_a_training_layers_of_all_networks_stand_in_one_column(tmp_path):
    loss, td = ppo(), TensorDict({"observation": torch.randn(20, 2)}, [20])
    methods = {"rows": GradientCovariance(rows=8), "mean": GradientNorms(rows=8)}
    kept = []
    with Observer(methods, when=At(0) | Every(optim_steps=1), into=tmp_path, on=ProbeSet(td)) as observer:
        for step in range(2):
            observer.step(loss, step=step)
            kept.append(copy.deepcopy(loss.critic_network.module))
            with torch.no_grad():
                for p in loss.parameters():
                    p += 0.1 * torch.randn_like(p)
        layers = list(observer.buffer["mean"].coords["layer"])
        targets = list(observer.buffer["mean"].coords["target"])
        row, sampled = observer.buffer["mean"].at(1).clone(), observer.buffer["rows"].at(1).clone()
    own = [i for i, layer in enumerate(layers) if layer.startswith("critic_network")]
    place = targets.index("state_value")
    x = td["observation"][[0, 2, 5, 7, 10, 12, 15, 17]]
    one, two = (loop(net, x) for net in kept)
    for i, (a, b) in zip(own, zip(one.values(), two.values(), strict=True), strict=True):
        assert float(row["gradient_turn"][i, place]) == pytest.approx(
            float(torch.cosine_similarity(a.mean(0), b.mean(0), 0)), abs=1e-5
        )
        assert float(sampled["sample_gradient_norm"][i, place]) == pytest.approx(float(b.norm(dim=1).mean()), rel=1e-5)
    assert set(targets) == {"loc.0", "loc.1", "state_value"}
    cosine, *_ = by_hand(torch.cat(list(two.values()), 1))
    torch.testing.assert_close(sampled["critic_network", "gradient_cosine"][0], torch.tensor(cosine), atol=1e-5, rtol=0)
    with pytest.raises(TargetError, match="'lok' is given out by no network"):
        measured(GradientNorms("lok"), mlp(3, 2), batch())
