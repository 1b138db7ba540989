"""Values against returns: against scikit-learn and scipy."""

import pytest
import scipy.stats
import torch
from method_cases import measured
from sklearn.metrics import explained_variance_score, r2_score
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss

from tdhook_train import At, Observer, ProbeSet
from tdhook_train.errors import KeyMissingError, TargetError
from tdhook_train.health import ValueCalibration


class Gives(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


DEFAULT = ValueCalibration()


def on(values, returns, method=DEFAULT):
    td = TensorDict({"input": torch.zeros(len(values), 1), "value_target": returns}, [len(values)])
    return measured(method, Gives(values), td, out_keys=["state_value"])


@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("offset", [0.0, -3.0, 1e4])
def test_against_scikit_learn_and_scipy(noise, offset):
    returns = torch.randn(200, 1) * 2 + 1
    values = returns * 0.7 + noise * torch.randn(200, 1) + offset
    out = on(values, returns)
    v, r = values.double().flatten().numpy(), returns.double().flatten().numpy()
    assert float(out["explained_variance"]) == pytest.approx(explained_variance_score(r, v), abs=1e-9)
    assert float(out["value_r2"]) == pytest.approx(r2_score(r, v), rel=1e-9)
    assert float(out["value_slope"]) == pytest.approx(scipy.stats.linregress(v, r).slope, rel=1e-6)
    assert float(out["value_bias"]) == pytest.approx((v - r).mean(), rel=1e-9)
    assert int(out["value_reason"]) == 0


def test_an_offset_of_five_is_forgiven_by_the_explained_variance_alone():
    returns = torch.randn(500, 1, dtype=torch.float64)
    returns = (returns - returns.mean()) / returns.std(correction=0) * 1.0206
    out = on(returns + 5, returns)
    assert float(out["explained_variance"]) == pytest.approx(1)
    assert float(out["value_bias"]) == pytest.approx(5)
    assert float(out["value_slope"]) == pytest.approx(1)
    assert float(out["value_r2"]) == pytest.approx(1 - 25 / 1.0206**2)  # -23


def test_what_is_all_the_same_or_not_finite_says_so():
    some, bit = torch.randn(21, 1), torch.finfo(torch.float32).eps
    same = torch.full((21, 1), 0.1) * (1 + bit * (torch.arange(21)[:, None] % 2))
    assert len(same.unique()) == 2  # but for the last bit
    out = on(some, same)
    assert (int(out["value_reason"]), float(out["value_bias"])) == (
        2,
        pytest.approx(float(some.mean()) - 0.1, rel=1e-5),
    )
    assert out["explained_variance"].isnan()
    assert out["value_r2"].isnan()
    assert float(out["value_slope"]) == pytest.approx(0, abs=1e-6)
    out = on(same, some)
    assert int(out["value_reason"]) == 3
    assert out["value_slope"].isnan()
    assert float(out["explained_variance"]) == pytest.approx(0, abs=1e-6)
    both = on(same, same)
    assert int(both["value_reason"]) == 2
    assert [both[key].isnan().item() for key in ValueCalibration.shown] == [True, True, True, False]
    for bad in (torch.nan, torch.inf):
        spoilt = some.clone()
        spoilt[3] = bad
        for pair in ((spoilt, some), (some, spoilt), (spoilt, spoilt)):
            out = on(*pair)
            assert int(out["value_reason"]) == 1
            assert all(out[key].isnan() for key in ValueCalibration.shown)


def test_whole_numbers_and_one_row():
    out = on(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 2, 3]))
    expected = r2_score([1, 2, 3], [1, 2, 4])
    assert float(out["value_r2"]) == pytest.approx(expected)
    alone = on(torch.ones(1, 1), torch.zeros(1))
    assert (int(alone["value_reason"]), float(alone["value_bias"])) == (2, 1.0)


def test_every_agent_and_head_is_a_sample():
    values, returns = torch.randn(10, 3, 1), torch.randn(10, 3, 1)
    flat = on(values.reshape(30, 1), returns.reshape(30, 1))
    whole = on(values, returns)
    for key in ValueCalibration.shown:
        assert float(whole[key]) == pytest.approx(float(flat[key]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(TargetError, match=r"'state_value' has \(6, 1\), the returns 'value_target' \(6, 2\)"):
        on(torch.randn(6, 1), torch.randn(6, 2))
    with pytest.raises(KeyMissingError, match="did you mean 'value_target'"):
        on(torch.randn(6, 1), torch.randn(6, 1), ValueCalibration(returns="value_targe"))
    with pytest.raises(TargetError, match="'value' is given out by no network"):
        on(torch.randn(6, 1), torch.randn(6, 1), ValueCalibration("value"))


def test_live_the_critics_own_values_are_taken_and_not_those_that_the_batch_recorded(tmp_path):
    actor = ProbabilisticActor(
        TensorDictModule(nn.Linear(1, 3), ["state_value"], ["logits"]),  # reads what was recorded, which then stays
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    loss = ClipPPOLoss(actor, ValueOperator(nn.Linear(2, 1), in_keys=["observation"]))
    td = TensorDict({"observation": torch.randn(40, 2), "value_target": torch.randn(40, 1)}, [40])
    td["state_value"] = torch.zeros(40, 1)
    with Observer({"v": ValueCalibration()}, when=At(0), into=tmp_path, on=ProbeSet(td)) as observer:
        observer.step(loss, step=0)
        row = observer.buffer["v"].at(0)
    v = loss.critic_network(td.clone())["state_value"].detach().flatten().numpy()
    assert set(row.keys()) - {"meta"} == {"critic_network"}
    found = row["critic_network", "explained_variance"]
    assert float(found) == pytest.approx(explained_variance_score(td["value_target"].flatten().numpy(), v), rel=1e-4)
