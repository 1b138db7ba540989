"""Policies with a memory are measured step by step, each row from the hidden state that the batch holds for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential, set_interaction_type
from tensordict.nn.probabilistic import interaction_type
from torch import nn
from torch.testing import assert_close
from torchrl.collectors import Collector
from torchrl.envs import Compose, EnvBase, GymEnv, InitTracker, TransformedEnv
from torchrl.modules import (
    GRUModule,
    LSTMModule,
    OneHotCategorical,
    ProbabilisticActor,
    QValueModule,
    ValueOperator,
    recurrent_mode,
    set_recurrent_mode,
)
from torchrl.objectives import ClipPPOLoss, DQNLoss, SoftUpdate
from torchrl.objectives.value import GAE

from tdhook_train import At, Every, Method, Observer
from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.errors import KeyMissingError
from tdhook_train.health import DeadUnits, EffectiveRank
from tdhook_train.latent import ActivationPatching, RidgeProbe
from tdhook_train.rl import ObservedLoss

FRAMES, HIDDEN = 40, 5
KINDS = {"lstm": LSTMModule, "gru": GRUModule}
STATES = {"lstm": ["recurrent_state_h", "recurrent_state_c"], "gru": ["recurrent_state"]}


@dataclass(frozen=True)
class Given(Method):
    """What a network gives out, row by row."""

    keys: tuple[Any, ...] = ("logits",)

    writes: ClassVar = {"logits": "batch unit", "action_value": "batch unit", "next": "batch layer unit"}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return seen.batch.select(*self.keys).clone()


def memory(kind: str, **options: Any) -> nn.Module:
    made = KINDS[kind](input_size=4, hidden_size=HIDDEN, num_layers=2, in_key="embed", out_key="hidden", **options)
    assert isinstance(made, nn.Module)
    return made


def policy(recurrent: nn.Module) -> ProbabilisticActor:
    net = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 4), ["observation"], ["embed"]),
        recurrent,
        TensorDictModule(nn.Linear(HIDDEN, 2), ["hidden"], ["logits"]),
    )
    return ProbabilisticActor(
        net, in_keys=["logits"], distribution_class=OneHotCategorical, return_log_prob=True, spec=None
    )


def values(recurrent: nn.Module) -> TensorDictSequential:
    return TensorDictSequential(
        TensorDictModule(nn.Linear(4, 4), ["observation"], ["embed"]),
        recurrent,
        TensorDictModule(nn.Linear(HIDDEN, 2), ["hidden"], ["action_value"]),
        QValueModule(action_space="one_hot"),
    )


def remembering(recurrent: Any) -> EnvBase:
    return TransformedEnv(GymEnv("CartPole-v1"), Compose(InitTracker(), recurrent.make_tensordict_primer()))


def collected(acting: nn.Module, recurrent: Any, batches: int = 1) -> Iterator[TensorDictBase]:
    env = remembering(recurrent)
    env.set_seed(0)
    collector = Collector(
        env, acting, frames_per_batch=FRAMES, total_frames=FRAMES * batches, auto_register_policy_transforms=False
    )
    yield from collector
    collector.shutdown()


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "left alone": nullcontext,
    "asked for sequences": lambda: set_recurrent_mode(True),
}


@pytest.mark.parametrize("default", [None, True], ids=["stepwise", "sequences by default"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_policy_gave_when_it_acted(kind, mode, default, tmp_path):
    torch.manual_seed(0)
    recurrent = memory(kind, default_recurrent_mode=default)
    acting = policy(recurrent)
    with set_recurrent_mode(False):
        (td,) = collected(acting, recurrent)
    assert td["is_init"].sum() > 1  # trajectories end inside the batch
    states = [("next", name) for name in STATES[kind]]
    observer = Observer({"given": Given(("logits", *states))}, when=At(0), into=tmp_path, on="collected")
    observer.collected(td)
    with MODES[mode]():
        before = recurrent_mode()
        observer.step(acting, step=0)
        assert recurrent_mode() is before
    row = observer.buffer["given"].at(0)
    assert_close(row["logits"], td["logits"])
    for state in states:
        # a collector resets the state that follows a step into an end
        going_on = ~td["next", "done"].squeeze(-1)
        assert_close(row[state][going_on], td[state][going_on])
    observer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_what_a_memory_reads_is_refused_with_the_way_to_it(kind, tmp_path):
    recurrent = memory(kind)
    state = TensorDict({key: torch.zeros(6, 2, HIDDEN) for key in STATES[kind]})
    init = TensorDict(is_init=torch.zeros(6, 1, dtype=torch.bool))
    observation = TensorDict(observation=torch.zeros(6, 4), batch_size=[6])
    for key, rest, transform in (
        (STATES[kind][0], init, r"<module>\.make_tensordict_primer\(\)"),
        ("is_init", state, r"InitTracker\(\)"),
    ):
        says = rf"input '{key}' of ProbabilisticActor is not in the batch: 'module\.0\.module\.1' "
        says += rf"\({KINDS[kind].__name__}\).*env\.append_transform\({transform}\)"
        td = observation.copy().update(rest)
        with (
            Observer({"given": Given()}, when=At(0), into=tmp_path / key) as observer,
            pytest.raises(KeyMissingError, match=says),
        ):
            observer.step(policy(recurrent), td, step=0)


def ppo() -> tuple[nn.Module, ClipPPOLoss, GAE, Any]:
    torch.manual_seed(0)
    recurrent = memory("lstm")
    acting, critic = policy(recurrent), ValueOperator(nn.Linear(4, 1), in_keys=["observation"])
    return acting, ClipPPOLoss(acting, critic), GAE(gamma=0.9, lmbda=0.9, value_network=critic), recurrent


def train_ppo(into: Any = None) -> tuple[dict[str, torch.Tensor], Any]:
    """Collect and train twice on sequences, with an observer where there is a folder for one."""
    acting, loss, advantage, recurrent = ppo()
    optimizer = torch.optim.Adam(loss.parameters(), 0.01)
    observer, seen = None, {}
    if into is not None:
        methods = {
            "given": Given(networks="actor_network"),
            "probe": RidgeProbe(target=("observation", 0)),
            "rank": EffectiveRank(),
            "dead": DeadUnits(),
            "saliency": Saliency(targets=[("logits", 0)]),
            "ig": IntegratedGradients(targets=[("logits", 0)], rows=4),
            "patching": ActivationPatching(targets=[("logits", 0)], pairs=4),
        }
        observer = Observer(methods, when=At(0) | Every(optim_steps=2), into=into)
        ObservedLoss(loss, observer, optimizer)
    step = 0
    for td in collected(acting, recurrent, batches=2):
        advantage(td)
        sequences = td.reshape(4, -1)
        for _ in range(3):
            if step % 3 == 0:  # only then were the batch's own outputs given by these weights
                seen[step] = td["logits"].clone()
            losses = loss(sequences)
            (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    end = {name: value.detach().clone() for name, value in loss.named_parameters()}
    end |= {"rng": torch.get_rng_state(), "seen": torch.stack(list(seen.values()))}
    return end, observer


def test_ppo_with_an_lstm_ends_in_the_same_bits_and_rows_are_right(tmp_path):
    bare, _ = train_ppo()
    watched, observer = train_ppo(tmp_path)
    assert bare.keys() == watched.keys()
    assert all(torch.equal(bare[name], watched[name]) for name in bare)
    rows = observer.buffer["given"]
    assert rows.steps.tolist() == [0, 2, 4]
    assert_close(rows.at(0)["actor_network", "logits"], watched["seen"][0])
    assert not torch.allclose(rows.at(2)["actor_network", "logits"], watched["seen"][0], atol=1e-4)
    lstm = "actor_network.module.0.module.1.lstm"
    layers = observer.buffer["probe"].coords["layer"]
    assert [name for name in layers if lstm in name] == [f"{lstm}:0", f"{lstm}:1:0", f"{lstm}:1:1"]
    assert observer.buffer["probe"].at(4)["r2"].isfinite().all()
    observer.close()


def test_dqn_with_a_gru_ends_in_the_same_bits_and_rows_are_right(tmp_path):
    ends = {}
    for watched in (False, True):
        torch.manual_seed(0)
        recurrent = memory("gru")
        net = values(recurrent)
        (td,) = collected(net, recurrent)
        loss = DQNLoss(net, action_space="one_hot", delay_value=True)
        loss.make_value_estimator(gamma=0.9)
        updater, optimizer = SoftUpdate(loss, tau=0.5), torch.optim.Adam(loss.parameters(), 0.01)
        into = tmp_path / str(watched)
        with Observer({"given": Given(("action_value",))}, when=Every(optim_steps=1) | At(0), into=into) as observer:
            if watched:
                ObservedLoss(loss, observer, optimizer)
            for _ in range(2):
                loss(td.reshape(4, -1))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                updater.step()
            ends[watched] = [*(value.clone() for value in loss.state_dict().values()), torch.get_rng_state()]
            if not watched:
                continue
            first, second = (observer.buffer["given"].at(step) for step in (0, 1))
            assert_close(first["value_network", "action_value"], td["action_value"])
            of_target = [row["target_value_network", "action_value"] for row in (first, second)]
            assert torch.equal(of_target[0], first["value_network", "action_value"])
            assert not torch.allclose(of_target[1], second["value_network", "action_value"])
    assert all(torch.equal(bare, other) for bare, other in zip(ends[False], ends[True], strict=True))


def test_hidden_states_are_layers_whose_rows_are_those_of_the_batch(tmp_path):
    torch.manual_seed(0)
    recurrent = memory("lstm")
    acting = policy(recurrent)
    (td,) = collected(acting, recurrent)
    lstm = "module.0.module.1.lstm"
    after = ("next", "recurrent_state_h")

    def first_unit(given: TensorDictBase) -> torch.Tensor:
        return given[after][:, 1, 0]

    methods = {
        "probe": RidgeProbe(layers=[f"{lstm}:1:0", f"{lstm}:0"], target=first_unit, alphas=(1e-8,)),
        "patching": ActivationPatching(layers=[f"{lstm}:1:0", f"{lstm}:1:1"], targets={"h": first_unit}, pairs=6),
    }
    observer = Observer(methods, when=At(0), into=tmp_path, on="collected")
    observer.collected(td)
    observer.step(acting, step=0)
    probe = observer.buffer["probe"].at(0)
    # the last layer's hidden state is what the LSTM gives out: either determines its own unit
    assert_close(probe["r2"], torch.ones(2, 1, dtype=torch.float64), rtol=0, atol=1e-4)
    patched = observer.buffer["patching"].at(0)
    assert_close(patched["normalised"][:, 0], torch.tensor([1.0, 0.0]))
    assert_close(patched["unit_normalised"][:, :, 0], torch.tensor([[1.0, 0, 0, 0, 0], [0.0] * 5]))
    observer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand_a_memory_is_run_step_by_step_and_a_policy_acts_by_its_mode_as_in_an_observer(kind, tmp_path):
    torch.manual_seed(0)
    recurrent = memory(kind, default_recurrent_mode=True)
    acting = policy(recurrent)
    with set_recurrent_mode(False):
        (td,) = collected(acting, recurrent)
    most_likely = nn.functional.one_hot(td["logits"].argmax(-1), 2)
    assert not torch.equal(td["action"], most_likely)  # as it was drawn
    method = ActivationPatching(layers=nn.Linear, targets=[("logits", 0)], pairs=6)
    with Observer({"one": method}, when=At(0), into=tmp_path, on="collected") as observer:
        observer.collected(td)
        observer.step(acting, step=0)
        row = observer.buffer["one"].at(0)
    with set_recurrent_mode(True), set_interaction_type(InteractionType.RANDOM), method.prepare(acting) as hooked:
        found = hooked(td)
        assert recurrent_mode() is True
        assert interaction_type() is InteractionType.RANDOM
    assert_close(found["logits"], td["logits"])
    assert torch.equal(found["action"], most_likely)
    assert_close(found["unit_effect"], row["unit_effect"], equal_nan=True)
