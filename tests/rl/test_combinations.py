"""Parts that were made apart, together: what the process in the background measures is what the training would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses import LOSSES
from small_envs import OBS, Noisy, Paying, acting
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from test_background import rows
from test_collectors import PER_BATCH, in_a_thread, leaving_nothing, states, stochastic
from test_observer_hook import make_trainer
from test_policies_multi_agent import NET
from test_policies_pixels import batch as images
from test_policies_pixels import loss as of_pixels
from test_policies_recurrent import collected, ppo
from tiny import Drift, collector_of, stochastic_actor
from torch import nn
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, TD3Loss

from tdhook_train import At, Every, Observer, ProbeSet
from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.health import DeadUnits, DormantUnits, EffectiveRank
from tdhook_train.latent import ActivationPatching, RidgeProbe
from tdhook_train.rl import AblatedReturn, ObservedLoss, ObserverHook

EVERY = At(0) | Every(optim_steps=1)

Observing = Callable[..., Observer]


def updated(loss: nn.Module, batch: TensorDict, observer: Observer, steps: int = 2) -> list[torch.Tensor]:
    """Train on one batch, observed; the weights and random state it ends in."""
    optimizer = torch.optim.Adam(loss.parameters(), 0.01)
    ObservedLoss(loss, observer, optimizer)
    for _ in range(steps):
        losses = loss(batch)
        sum(value.sum() for key, value in losses.items() if key.startswith("loss")).backward()
        optimizer.step()
        optimizer.zero_grad()
    observer.finish()
    return [*(value.clone() for value in loss.state_dict().values()), torch.get_rng_state()]


def recurrent(observing: Observing) -> Any:
    policy, loss, advantage, memory = ppo()
    (td,) = collected(policy, memory)
    advantage(td)
    methods = {
        "probe": RidgeProbe(target=("observation", 0), networks="actor_network", folds=2, shifts=19),
        "patching": ActivationPatching(targets=[("logits", 0)], pairs=4),
        "ig": IntegratedGradients(targets=[("logits", 0)], rows=3),
    }
    return updated(loss, td.reshape(4, -1), observing(methods, on=ProbeSet(td)))


def agents(observing: Observing) -> Any:
    case = LOSSES["IPPOLoss"]()
    methods = {"dead": DeadUnits(layers="**:agent 0"), "rank": EffectiveRank(layers=f"**.{NET.split('.')[-1]}.*")}
    return updated(case.loss, case.batch, observing(methods))


def over_time(observing: Observing) -> Any:
    case = LOSSES["DTLoss"]()
    return updated(case.loss, case.batch, observing({"rank": EffectiveRank()}, on="batch"))


def pixels(observing: Observing) -> Any:
    loss, td = of_pixels(3), images(as_bytes=True)
    explained = {"targets": [("logits", 0)], "networks": "actor_network"}
    methods = {"ig": IntegratedGradients(rows=2, **explained), "saliency": Saliency(**explained)}
    methods["patching"] = ActivationPatching(layers=nn.Conv2d, pairs=2)
    return updated(loss, td, observing(methods))


def returns(observing: Observing) -> Any:
    td = TensorDict(observation=torch.randn(6, OBS), action=torch.zeros(6, 1), batch_size=[6])
    net = nn.Sequential(nn.Linear(OBS, 2), NormalParamExtractor())
    body = TensorDictModule(net, ["observation"], ["loc", "scale"])
    actor = ProbabilisticActor(body, ["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True)
    loss = ClipPPOLoss(actor, ValueOperator(nn.Linear(OBS, 1), in_keys=["observation"]))
    td.update({"action_log_prob": torch.zeros(6), "advantage": torch.randn(6, 1), "value_target": torch.randn(6, 1)})
    # an environment that draws from every global state, and a policy that draws its actions
    played = AblatedReturn(Noisy, nn.Linear, units="each", episodes=2, exploration="random")
    return updated(loss, td, observing({"return": played, "mean": AblatedReturn(Paying, nn.Linear, by="mean")}))


def several_sources(observing: Observing) -> Any:
    actor = stochastic_actor()
    loss = ClipPPOLoss(actor, ValueOperator(nn.Linear(2, 1), in_keys=["observation"]))
    collector = collector_of(actor)
    methods = {"rank": EffectiveRank(), "ig": IntegratedGradients(rows=2, targets=[("loc", 0)])}
    on = {
        "now": "collected",
        "first": ProbeSet.first(collector, frames=30),
        "then": ProbeSet.first(collector, frames=20, refresh=Every(frames=40)),
    }
    observer = observing(methods, on=on)
    optimizer = torch.optim.Adam(loss.parameters(), 0.01)
    ObservedLoss(loss, observer, optimizer)
    for td in collector:
        observer.collected(td)
        td.update({"advantage": torch.randn(*td.shape, 1), "value_target": torch.randn(*td.shape, 1)})
        loss(td)["loss_objective"].backward()
        optimizer.step()
        optimizer.zero_grad()
    collector.shutdown()
    observer.finish()
    return [*(value.clone() for value in loss.state_dict().values()), torch.get_rng_state()]


def trainer(observing: Observing) -> Any:
    made = make_trainer()
    methods = {"rank": EffectiveRank(), "probe": RidgeProbe(target=("observation", 0), folds=2, shifts=0)}
    ObserverHook(observing(methods, on="collected")).register(made)
    made.train()
    return [*(value.clone() for value in made.loss_module.state_dict().values()), torch.get_rng_state()]


def double(observing: Observing) -> Any:
    case = LOSSES["SACLoss"]()
    td = case.batch.apply(lambda value: value.double() if value.is_floating_point() else value)
    methods = {"rank": EffectiveRank(), "ig": IntegratedGradients(rows=2), "patching": ActivationPatching(pairs=2)}
    return updated(case.loss.double(), td, observing(methods))


def normed(observing: Observing) -> Any:
    case = LOSSES["CrossQLoss"]()
    methods = {"rank": EffectiveRank(), "ig": IntegratedGradients(rows=2), "dormant": DormantUnits()}
    return updated(case.loss, case.batch, observing(methods))


def dropped(observing: Observing) -> Any:
    net = nn.Sequential(nn.Linear(OBS, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 1))
    critic = MLP(OBS + 1, 1, num_cells=[6], norm_class=nn.BatchNorm1d, norm_kwargs=[{"num_features": 6}], dropout=0.5)
    value = ValueOperator(critic, in_keys=["observation", "action"])
    loss = TD3Loss(acting(net), value, bounds=(-1, 1), delay_qvalue=False)
    loss.make_value_estimator(gamma=0.9)
    then = TensorDict(
        observation=torch.randn(8, OBS),
        reward=torch.randn(8, 1),
        done=torch.zeros(8, 1, dtype=torch.bool),
        terminated=torch.zeros(8, 1, dtype=torch.bool),
        batch_size=[8],
    )
    td = TensorDict(observation=torch.randn(8, OBS), action=torch.rand(8, 1), next=then, batch_size=[8])
    methods = {"rank": EffectiveRank(), "saliency": Saliency(), "patching": ActivationPatching(pairs=2)}
    return updated(loss, td, observing(methods))


SCENES = (
    recurrent,
    agents,
    over_time,
    pixels,
    returns,
    several_sources,
    trainer,
    double,
    normed,
    dropped,
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The 'optimizer' hook stage", "ignore:No target network updater")
@pytest.mark.parametrize("scene", SCENES)
def test_a_process_of_its_own_measures_what_the_training_would(scene, tmp_path):
    found, ends = {}, {}
    for background in (False, 100):
        into = tmp_path / str(background)
        made: list[Observer] = []

        def observing(methods: Any, into: Any = into, background: Any = background, made: Any = made, **options: Any):
            made.append(Observer(methods, when=EVERY, into=into, background=background, **options))
            return made[0]

        torch.manual_seed(0)
        try:
            ends[background] = scene(observing)
        finally:
            for observer in made:
                observer.close()
        found[background] = rows(into)
    assert found[False].keys() == found[100].keys()
    assert len(found[False]) > 3
    assert [key for key in found[False] if found[False][key] != found[100][key]] == []
    assert all(torch.equal(one, other) for one, other in zip(ends[False], ends[100], strict=True))


@pytest.mark.slow
def test_the_process_measures_beside_a_collectors_thread_also_what_plays_and_draws(tmp_path):
    played = AblatedReturn(Drift, nn.Tanh, episodes=2, max_steps=5, exploration="random")
    methods = {"return": played, "ig": IntegratedGradients(targets=[("loc", 0)]), "rank": EffectiveRank()}
    on = ProbeSet(states(), groups="rows")
    found = {}
    for threaded in (False, True):
        policy, loss = stochastic()
        collector = in_a_thread(policy)
        into = tmp_path / str(threaded)
        with (
            leaving_nothing(collector, loss),
            Observer(methods, when=EVERY, into=into, on=on, background=100) as observer,
        ):
            if threaded:
                collector.start()
            for step in range(3):
                observer.step(loss, step=step)
            if threaded:
                while collector.replay_buffer.write_count < 3 * PER_BATCH:
                    pass
                collector.async_shutdown(close_env=False)
                frames = collector.replay_buffer[:]
            observer.finish(step=3)
        found[threaded] = rows(into)
    # the policy does not learn here: every frame is its own, drawn as it draws
    assert torch.allclose(frames["loc"], policy(frames.clone())["loc"], atol=1e-6)
    noise = (frames["action"].double().atanh() - frames["loc"]) / frames["scale"]
    assert not torch.isclose(noise, torch.zeros(()).double(), atol=1e-6).any()
    assert found[False] == found[True]
    assert len({key[0] for key in found[True]}) == 3
