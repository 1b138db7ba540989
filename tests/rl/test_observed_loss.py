"""The observed loss is the loss, and steps are counted as the optimizer takes them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, SACLoss, SoftUpdate

from tdhook_train import At, Every, Method, Observer, ProbeSet
from tdhook_train.attribution import IntegratedGradients
from tdhook_train.errors import GroupsError, NetworkError, PathError, TargetError
from tdhook_train.latent import ActivationPatching, RidgeProbe
from tdhook_train.rl import ObservedLoss, networks, observe_loss


@dataclass(frozen=True)
class Bias(Method):
    """The first bias of each network: tells which weights were measured."""

    writes: ClassVar = {"bias": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return TensorDict({"bias": next(p for p in model.module.parameters() if p.ndim == 1)[0].clone()})


class ValueAndAction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([observation, action], -1))


def actor() -> ProbabilisticActor:
    body = TensorDictModule(nn.Sequential(nn.Linear(3, 4), NormalParamExtractor()), ["observation"], ["loc", "scale"])
    return ProbabilisticActor(body, in_keys=["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True)


def ppo(**options: Any) -> ClipPPOLoss:
    torch.manual_seed(0)
    return ClipPPOLoss(actor(), ValueOperator(nn.Linear(3, 1), in_keys=["observation"]), **options)


def batch(rows: int = 12, *, groups: bool = True) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    td = TensorDict(
        observation=draw(rows, 3),
        action=draw(rows, 2).tanh() * 0.9,
        action_log_prob=draw(rows),
        advantage=draw(rows, 1),
        value_target=draw(rows, 1),
        batch_size=[rows],
    )
    if groups:
        td["collector", "traj_ids"] = torch.arange(rows) // 3
    return td


def total(losses: TensorDict) -> torch.Tensor:
    """Add what is minimised."""
    return losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]


def test_the_loss_comes_back_itself(tmp_path: Path) -> None:
    loss = ppo()
    torch.manual_seed(5)  # the entropy of a squashed normal is sampled
    keys, before = list(loss.state_dict()), total(loss(batch())).item()
    observer = Observer({"b": Bias()}, when=At(0), into=tmp_path)
    observed = ObservedLoss(loss, observer)
    assert observed is loss
    assert list(observed.state_dict()) == keys
    torch.manual_seed(5)
    assert total(observed(batch())).item() == before
    assert observer.buffer["b"].series(("actor_network", "bias")).shape == (1,)
    observer.close()


def test_copies_and_pickles_leave_the_observer_behind(tmp_path: Path) -> None:
    observer = Observer({"b": Bias()}, when=Every(optim_steps=1), into=tmp_path)
    loss = ObservedLoss(ppo(), observer)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        twin(batch())
        twin(batch())
    assert list(observer.buffer) == []
    observer.close()


def test_steps_are_the_optimizers_own_under_accumulation(tmp_path: Path) -> None:
    loss = ppo()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    observer = Observer({"b": Bias()}, when=At(0) | Every(optim_steps=1), into=tmp_path)
    loss = ObservedLoss(loss, observer, optimizer)
    biases = []
    for _ in range(3):
        biases.append(networks(loss)["critic_network"].weights()["module", "bias"][0].item())
        for _ in range(4):  # accumulates
            total(loss(batch())).backward()
        optimizer.step()
        optimizer.zero_grad()
    observer.finish()
    biases.append(networks(loss)["critic_network"].weights()["module", "bias"][0].item())
    rows = observer.buffer["b"]
    assert rows.steps.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(rows.series(("critic_network", "bias")), torch.tensor(biases))
    observer.close()


def test_without_an_optimizer_steps_are_calls_in_training(tmp_path: Path) -> None:
    observer = Observer({"b": Bias()}, when=At(0) | Every(optim_steps=1), into=tmp_path)
    loss = ObservedLoss(ppo(), observer)
    loss(batch())
    with torch.no_grad():
        loss(batch())  # no training
    loss.eval()
    loss(batch())
    loss.train()
    loss(batch())
    assert observer.buffer["b"].steps.tolist() == [0, 1]
    observer.close()


@pytest.mark.parametrize("observed_first", [True, False])
def test_steps_go_on_from_a_checkpoint(observed_first: bool, tmp_path: Path) -> None:
    def steps(observer: Observer, loss: ClipPPOLoss, count: int) -> None:
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        observe_loss(loss, observer, optimizer=optimizer)
        for _ in range(count):
            total(loss(batch())).backward()
            optimizer.step()

    with Observer({"b": Bias()}, when=Every(optim_steps=1), into=tmp_path) as observer:
        steps(observer, ppo(), 3)
        state = observer.state_dict()
    with Observer({"b": Bias()}, when=Every(optim_steps=1), into=tmp_path, resume=True) as observer:
        loss = ppo()
        if observed_first:
            observe_loss(loss, observer, optimizer=torch.optim.SGD(loss.parameters(), lr=0.1)).remove()
        observer.load_state_dict(state)
        steps(observer, loss, 2)
        assert observer.buffer["b"].steps.tolist() == [1, 2, 3, 4]


def test_removing_the_handle_ends_it(tmp_path: Path) -> None:
    loss = ppo()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    observer = Observer({"b": Bias()}, when=Every(optim_steps=1), into=tmp_path)
    before = dict(loss._forward_pre_hooks)
    handle = observe_loss(loss, observer, optimizer=optimizer)
    assert dict(loss._forward_pre_hooks) != before
    handle.remove()
    handle.remove()
    assert dict(loss._forward_pre_hooks) == before
    assert not optimizer._optimizer_step_post_hooks
    loss(batch())
    assert observer.clock.batches == 0
    observer.close()


def test_each_member_of_an_ensemble_is_measured_with_its_own_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = TensorDictModule(ValueAndAction(), in_keys=["observation", "action"], out_keys=["state_action_value"])
    loss = SACLoss(actor(), q, num_qvalue_nets=2, target_entropy=-2.0)
    loss.make_value_estimator(gamma=0.99)
    updater = SoftUpdate(ObservedLoss(loss, observer := Observer({"b": Bias()}, when=At(0), into=tmp_path)), eps=0.9)
    td = batch().set(("next", "observation"), torch.randn(12, 3)).set(("next", "reward"), torch.randn(12, 1))
    for flag in ("done", "terminated"):
        td.set(("next", flag), torch.zeros(12, 1, dtype=torch.bool))
    loss(td)
    row = observer.buffer["b"].at(0)
    expected = loss.qvalue_network_params["module", "head", "0", "bias"][:, 0]
    found = torch.stack([row[f"qvalue_network.{i}", "bias"] for i in range(2)])
    torch.testing.assert_close(found, expected.detach())
    assert found[0] != found[1]
    updater.step()
    observer.close()


def test_other_networks_outputs_and_recorded_inputs_are_told_apart(tmp_path: Path) -> None:
    seen: list[TensorDict] = []

    @dataclass(frozen=True)
    class Keep(Bias):
        def measure(self, seen_now: Any, model: Any) -> TensorDict:
            seen.append(seen_now.batch)
            return super().measure(seen_now, model)

    observer = Observer({"b": Keep()}, when=At(0), into=tmp_path)
    loss = ObservedLoss(ppo(), observer)
    given = batch()
    loss(given)
    with torch.no_grad():
        value = loss.critic_network(given.clone())["state_value"]
    for known in seen:  # both networks know the present value, at the root and below its network's name
        torch.testing.assert_close(known["state_value"], value)
        torch.testing.assert_close(known["critic_network", "state_value"], value)
        torch.testing.assert_close(known["action"], known["loc"].tanh())  # the predicted action, not the recorded one
    observer.close()


def test_what_is_no_loss_is_refused(tmp_path: Path) -> None:
    observer = Observer({"b": Bias()}, when=At(0), into=tmp_path)
    with pytest.raises(NetworkError, match=r"expected a TorchRL loss module, got Linear; .* observer\.step"):
        ObservedLoss(nn.Linear(2, 2), observer)
    observer.close()


def test_a_loss_that_is_compiled_already_is_refused(tmp_path: Path) -> None:
    with Observer({"p": RidgeProbe(target="action")}, when=At(0), into=tmp_path) as observer:
        with pytest.raises(NetworkError, match=r"compiled already.*torch.compile\(ObservedLoss\(loss, observer"):
            ObservedLoss(torch.compile(ppo(), backend="eager"), observer)
        ObservedLoss(ppo(), observer)  # which the refusal left free to be observed


def test_a_pattern_that_matches_no_network_is_refused_before_training(tmp_path: Path) -> None:
    observer = Observer({"p": RidgeProbe(layers="critic_netwrk.**", target="y")}, when=At(0), into=tmp_path)
    with pytest.raises(PathError, match=r"did you mean 'critic_network"):
        ObservedLoss(ppo(), observer)
    observer.close()


@pytest.mark.parametrize("method", [IntegratedGradients, ActivationPatching])
def test_a_target_that_no_network_gives_out_is_refused_before_training(method: Any, tmp_path: Path) -> None:
    observer = Observer({"m": method(targets=["state_value", "logc"])}, when=At(0), into=tmp_path)
    with pytest.raises(TargetError, match="target 'logc' is given out by no network; did you mean 'loc'"):
        ObservedLoss(ppo(), observer)
    observer.close()


def test_a_network_can_be_named_in_patterns_and_settings(tmp_path: Path) -> None:
    one = RidgeProbe(layers="critic_network.**", target="action", shifts=0)
    two = RidgeProbe(target="action", shifts=0, networks="critic_network")
    observer = Observer({"one": one, "two": two}, when=At(0), into=tmp_path)
    ObservedLoss(ppo(), observer)(batch())
    assert observer.buffer["one"].coords["layer"] == ["critic_network.module"]
    assert torch.equal(observer.buffer["one"].series("r2"), observer.buffer["two"].series("r2"))
    observer.close()
    observer = Observer({"p": RidgeProbe(target="action", networks="critic")}, when=At(0), into=tmp_path / "other")
    with pytest.raises(NetworkError, match="did you mean 'critic_network'"):
        ObservedLoss(ppo(), observer)
    observer.close()


def test_frames_are_not_split_as_if_independent_unless_asked_for_by_name(tmp_path: Path) -> None:
    probe = {"p": RidgeProbe(target="action")}
    observer = Observer(probe, when=At(0), into=tmp_path / "a", on=ProbeSet(batch(groups=False)))
    with pytest.raises(GroupsError, match=r"neither \('collector', 'traj_ids'\) nor done flags.*groups='rows'"):
        ObservedLoss(ppo(), observer)(batch())
    observer.close()
    observer = Observer(probe, when=At(0), into=tmp_path / "b", on=ProbeSet(batch(groups=False), groups="rows"))
    ObservedLoss(ppo(), observer)(batch())
    assert observer.buffer["p"].series("r2").isfinite().any()
    assert (observer.buffer["p"].series("null_reason") == 2).all()
    observer.close()


@pytest.mark.parametrize("functional", [True, False])
def test_functional_or_not_gives_the_same_rows(functional: bool, tmp_path: Path) -> None:
    observer = Observer({"b": Bias()}, when=At(0), into=tmp_path)
    loss = ObservedLoss(ppo(functional=functional), observer)
    expected = loss.critic_network.module.bias[0].item() if not functional else None
    loss(batch())
    row = observer.buffer["b"].at(0)
    torch.manual_seed(0)
    actor()
    reference = nn.Linear(3, 1).bias[0].item()
    assert row["critic_network", "bias"].item() == pytest.approx(reference)
    assert expected is None or expected == pytest.approx(reference)
    observer.close()
