"""Return under ablation: closed forms, rollouts of networks ablated by hand, and no trace."""

import copy
import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
from small_envs import LENGTH, OBS, Noisy, Paying, Team, Uneven, acting, linear_policy
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from test_non_interference import everything, identical, train
from torch import nn
from torchrl.data import Composite
from torchrl.envs import GymEnv, InitTracker, StepCounter, TransformedEnv
from torchrl.modules import (
    MLP,
    GRUModule,
    NormalParamExtractor,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import SoftUpdate, TD3Loss

from tdhook_train import At, Every, Observer, ProbeSet
from tdhook_train.errors import KeyMissingError, NetworkError, PathError, SettingsError
from tdhook_train.rl import AblatedReturn, ObservedLoss
from tdhook_train.rl.ppo import make_env, make_ppo


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    Paying.opened.clear()


def states(rows=7):
    return TensorDict(observation=torch.randn(rows, OBS), action=torch.zeros(rows, 1), batch_size=[rows])


def seeds(count):
    """Say how a method without a generator seeds its rounds."""
    return torch.randint(2**31 - 1, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def starts(env, count):
    """What the first observations of the episodes are."""
    return torch.stack([(env.set_seed(seed), env.reset()["observation"])[1] for seed in seeds(count)])


def measured(method, model, td=None, **known):
    with method.prepare(model) as hooked:
        return hooked(states() if td is None else td, **known)


@pytest.mark.parametrize("by", ["zero", "mean"])
def test_returns_are_those_of_the_closed_form(by):
    net, td = linear_policy(), states()
    w1, w2 = (layer.weight.detach().double() for layer in net)
    out = measured(AblatedReturn(Paying, "module.0", units="each", by=by, episodes=5), acting(net), td)
    hidden = starts(Paying(), 5).double() @ w1.T
    held = (td["observation"].double() @ w1.T).mean(0) if by == "mean" else torch.zeros(3).double()
    each = torch.stack([torch.where(torch.arange(3) == unit, held, hidden) for unit in range(3)])
    intact, ablated, units = (LENGTH * (h @ w2.T)[..., 0] for h in (hidden, held.expand(5, 3), each))
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(out["return_intact"], intact)
    close(out["return_ablated"], ablated[None])
    close(out["unit_return_ablated"], units[None])
    close(out["drop"], (intact - ablated).mean()[None])
    close(out["unit_drop"], (intact - units).mean(-1)[None])
    assert out["env_steps"] == LENGTH * 5 * (1 + 1 + 3)


def test_one_unit_carries_the_whole_return():
    net = linear_policy(4)
    net[1].weight.data = torch.tensor([[0.0, 0.0, 5.0, 0.0]])
    out = measured(AblatedReturn(Paying, ("module.0", "module.1"), units=(0, 2, 9), episodes=3), acting(net))
    drop = out["return_intact"].mean()
    torch.testing.assert_close(out["drop"], drop.expand(2))
    torch.testing.assert_close(out["unit_drop"][0], torch.stack([drop * 0, drop * torch.nan, drop, drop * torch.nan]),
                               equal_nan=True)  # fmt: skip
    assert out["unit_drop"][1].isnan().tolist() == [False, True, True, True]  # one unit, and no unit 2
    assert drop != 0


def controller():
    """Push the cart to where the pole falls; units 0 and 1 say so to either side, unit 2 is idle."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    falls = torch.tensor([0.0, 0.3, 3.0, 1.0])
    net[0].weight.data = torch.stack([falls, falls, torch.ones(4)])
    net[2].weight.data = torch.tensor([[-1.0, -1.0, 0.0], [1.0, 1.0, 0.0]])
    for layer in (net[0], net[2]):
        layer.bias.data.zero_()
    return net


def rollouts(env, policy, count, max_steps):
    """Play by TorchRL's own call."""
    found = []
    for seed in seeds(count):
        env.set_seed(seed)
        with torch.no_grad():
            found.append(env.rollout(max_steps, policy)["next", "reward"].double().sum())
    env.close()
    return torch.stack(found)


def test_ablation_destroys_a_controller_as_it_does_one_ablated_by_hand():
    net, make = controller(), partial(GymEnv, "CartPole-v1")
    actor = partial(QValueActor, in_keys=["observation"], action_space="one-hot")
    td = TensorDict(observation=torch.randn(5, 4), batch_size=[5])
    method = AblatedReturn(make, "module.0.module.1", units="each", episodes=3, max_steps=150)
    out = measured(method, actor(net), td)
    assert (out["return_intact"] == 150).all()
    assert (out["return_ablated"] < 15).all()  # it pushes one way
    assert (out["unit_drop"] == 0).all()  # each of the two carries it alone
    one = controller()
    one[2].weight.data[:, 1] = 0
    out = measured(method, actor(one), td)
    assert out["unit_drop"][0, 0] > 100 > 0 == out["unit_drop"][0, 1] == out["unit_drop"][0, 2]
    for lost, found in ((range(3), out["return_ablated"][0]), ([0], out["unit_return_ablated"][0, 0])):
        twin = copy.deepcopy(one)
        twin[2].weight.data[:, list(lost)] = 0
        assert torch.equal(found, rollouts(make(), actor(twin), 3, 150))


def test_episodes_are_played_side_by_side_where_the_environment_has_lanes():
    net, make = linear_policy(), partial(Uneven, 3)
    out = measured(AblatedReturn(make, "module.0", episodes=5), acting(net))
    pays = net(starts(make(), 2)).reshape(6)[:5].detach().double()  # two rounds of three lanes
    lengths = torch.tensor([1, 2, 3, 1, 2])
    torch.testing.assert_close(out["return_intact"], pays * lengths)
    assert (out["return_ablated"] == 0).all()
    assert out["env_steps"] == 2 * 12  # what was played of the sixth episode counts too


def test_an_episode_that_does_not_end_is_cut_off():
    whole, half = (
        measured(AblatedReturn(Paying, "module.0", episodes=2, max_steps=n), acting(linear_policy()))
        for n in (LENGTH, LENGTH // 2)
    )
    assert whole["env_steps"] == 2 * half["env_steps"] == LENGTH * 2 * 2


def test_an_episode_that_the_environment_cuts_off_has_ended():
    method = AblatedReturn(lambda: TransformedEnv(Paying(), StepCounter(3)), "module.0", episodes=2)
    assert measured(method, acting(linear_policy()))["env_steps"] == 3 * 2 * 2


def test_agents_returns_are_added():
    net = linear_policy()
    policy = acting(net, ("agents", "observation"), ("agents", "action"))
    td = TensorDict({("agents", "observation"): torch.randn(5, 2, OBS)}, [5])
    out = measured(AblatedReturn(Team, "module.0", episodes=2), policy, td)
    env = Team()
    drawn = torch.stack([(env.set_seed(seed), env.reset()["agents", "observation"])[1] for seed in seeds(2)])
    torch.testing.assert_close(out["return_intact"], LENGTH * net(drawn).double().sum((1, 2)).detach())


def test_channels_of_an_image_are_its_units():
    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, (1, 2), bias=False)
            self.head = nn.Linear(4, 1, bias=False)

        def forward(self, x):
            return self.head(self.conv(x[..., None, None, :]).flatten(-3))

    net = Seeing()
    out = measured(AblatedReturn(Paying, "module.conv", units="each", episodes=2), acting(net))
    for channel in range(2):
        twin = copy.deepcopy(net)
        twin.conv.weight.data[channel] = 0
        torch.testing.assert_close(out["unit_return_ablated"][0, channel], rollouts(Paying(), acting(twin), 2, 9))
    assert out["unit_drop"].shape == (1, 2)


def test_a_recurrent_policy_remembers_while_it_plays():
    gru = GRUModule(OBS, 4, in_keys=["observation", "hidden", "is_init"], out_keys=["features", ("next", "hidden")])

    def make():
        env = TransformedEnv(Paying(), InitTracker())
        return env.append_transform(gru.make_tensordict_primer())

    def policy(head):
        return TensorDictSequential(gru, TensorDictModule(head, ["features"], ["action"]))

    head = nn.Linear(4, 1)
    td = states().update({"hidden": torch.zeros(7, 1, 4), "is_init": torch.zeros(7, 1, dtype=torch.bool)})
    out = measured(AblatedReturn(make, "module.0.gru:0", units=(1,), episodes=2), policy(head), td)
    twin = copy.deepcopy(head)
    twin.weight.data[:, 1] = 0
    torch.testing.assert_close(out["return_intact"], rollouts(make(), policy(head), 2, 9))
    torch.testing.assert_close(out["unit_return_ablated"][0, 1], rollouts(make(), policy(twin), 2, 9))


def drawing_policy():
    body = TensorDictModule(nn.Sequential(nn.Linear(OBS, 2), NormalParamExtractor()), ["observation"], ["loc", "scale"])
    return ProbabilisticActor(body, ["loc", "scale"], distribution_class=TanhNormal)


def test_a_policy_acts_by_its_mode_unless_it_is_to_explore():
    policy, td = drawing_policy(), states()
    fixed, drawn, again = (
        measured(AblatedReturn(Paying, "module.0.module.0", episodes=3, exploration=kind), policy, td)["return_intact"]
        for kind in ("deterministic", "random", "random")
    )
    loc = policy[0](TensorDict(observation=starts(Paying(), 3), batch_size=[3]))["loc"]
    torch.testing.assert_close(fixed, LENGTH * loc[:, 0].tanh().detach().double())
    assert torch.equal(drawn, again)
    assert not torch.isclose(fixed, drawn).any()


def test_every_ablation_plays_the_same_episodes_and_no_random_state_is_moved():
    net = linear_policy()
    net[0].weight.data[0] = 0  # a unit that is silent anyway
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    td = states()
    kept = torch.get_rng_state().tolist()
    out = measured(AblatedReturn(Noisy, "module.0", units="each", episodes=2), acting(net), td)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after[:2] == before[:2]
    assert after[2] == kept != before[2]
    assert torch.equal(out["unit_return_ablated"][0, 0], out["return_intact"])
    one, two = (
        measured(AblatedReturn(Noisy, "module.0"), acting(net), td, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    )
    assert not torch.isclose(one["return_intact"], two["return_intact"]).any()


def test_environments_are_closed_whatever_happens():
    class Breaking(Paying):
        def _step(self, td):
            raise ZeroDivisionError

    measured(AblatedReturn(Paying, "module.0"), acting(linear_policy()))
    with pytest.raises(ZeroDivisionError):
        measured(AblatedReturn(Breaking, "module.0"), acting(linear_policy()))
    assert Paying.opened == []
    assert Paying().opened  # which would have noticed


def td3():
    actor, value = (
        acting(linear_policy()),
        ValueOperator(MLP(OBS + 1, 1, num_cells=[4]), in_keys=["observation", "action"]),
    )
    loss = TD3Loss(actor, value, bounds=(-1.0, 1.0), num_qvalue_nets=2, delay_actor=True)
    SoftUpdate(loss, tau=0.5)
    return loss


def tick(methods, loss, into, td=None):
    """Measure once, as a training would; what the buffer then holds."""
    td = states() if td is None else td
    with Observer({"return": methods}, when=At(0), into=into, on=ProbeSet(td, groups="rows")) as observer:
        observer.attach(loss)
        observer.step(loss, step=0)
        return observer.buffer["return"].at(0), observer.buffer["return"].coords


def test_of_a_loss_the_policies_are_played_and_the_rest_is_not(tmp_path):
    loss = td3()
    with torch.no_grad():
        for weights in loss.target_actor_network_params.values(True, True):
            weights.mul_(2)
    row, coords = tick(AblatedReturn(Paying, ("module.0", "module.1"), units="each"), loss, tmp_path)
    names = [f"{network}.module.{layer}" for network in ("actor_network", "target_actor_network") for layer in (0, 1)]
    assert coords["layer"] == names
    live, target = (row[name, "return_intact"] for name in ("actor_network", "target_actor_network"))
    assert row["unit_return_ablated"].shape == (4, 3, 4)
    assert row["drop"].shape == (4,)
    assert not torch.isclose(live, target).any()
    torch.testing.assert_close(row["drop"], torch.stack([live.mean()] * 2 + [target.mean()] * 2))
    row, coords = tick(AblatedReturn(Paying, "module.0", networks="actor_network"), loss, tmp_path / "one")
    assert coords["layer"] == names[:1]


def test_what_has_no_policy_is_refused_before_training(tmp_path):
    class Other(Paying):
        def __init__(self):
            super().__init__()
            self.observation_spec = Composite(observatoin=self.observation_spec["observation"])

    cases = (
        (AblatedReturn(Team), NetworkError, r"the environment's action, 'agents\.action'; they give .*\['action'\]"),
        (AblatedReturn(Paying, networks="qvalue_network.0"), NetworkError, r"action, 'action'; they give .*state_act"),
        (AblatedReturn(Other), KeyMissingError, "reads 'observation', which the environment has not; did you mean"),
        (AblatedReturn(dict), SettingsError, "make_env gave a dict, which is no TorchRL environment"),
        (AblatedReturn(Paying, layers="9"), PathError, "layers='9' matches no module"),
    )
    for number, (method, error, said) in enumerate(cases):
        observer = Observer({"return": method}, when=At(0), into=tmp_path / str(number))
        with pytest.raises(error, match=said):
            observer.attach(td3())
        observer.close()
    with pytest.raises(SettingsError, match=r"a function that makes an environment, got make_env=Paying"):
        AblatedReturn(Paying())


def test_layers_of_no_policy_are_said(tmp_path):
    with pytest.raises(NetworkError, match="has nothing to measure on 'actor_network', 'target_actor_network'"):
        tick(AblatedReturn(Paying, "qvalue_network.0.**"), td3(), tmp_path)


def test_training_ends_in_the_same_bits(tmp_path):
    def ppo():
        random.seed(0)
        np.random.seed(0)
        return make_ppo("CartPole-v1", frames=512, seed=3, frames_per_batch=256)

    bare, watched = ppo(), ppo()
    expected = everything(bare, train(bare))
    watched = ppo()
    make = partial(make_env, "CartPole-v1")
    methods = [
        AblatedReturn(make, "module.0.module.1", units=(0, 1), by=by, episodes=2, max_steps=20, exploration=kind)
        for by, kind in (("zero", "random"), ("mean", "deterministic"))
    ]
    observer = Observer({"zero": methods[0], "mean": methods[1]}, when=At(0) | Every(optim_steps=20), into=tmp_path)
    watched.loss = ObservedLoss(watched.loss, observer, watched.optimizer)
    found = everything(watched, train(watched))
    assert observer.buffer["zero"].steps.tolist() == observer.buffer["mean"].steps.tolist() == [0, 20, 40, 60]
    for part, value in expected.items():
        assert identical(value, found[part]), part
    assert observer.buffer["zero"].series(("actor_network", "return_intact")).unique().numel() > 1
    observer.close()


class Shaken(Paying):
    """Draws from NumPy's random state, which no thread has to itself."""

    def pays(self, td):
        return td["action"] + float(np.random.rand())


@pytest.fixture
def beside():
    """Another thread, which draws whenever it is told to."""
    told, drawn, answers = threading.Semaphore(0), threading.Semaphore(0), []

    def run():
        while told.acquire() and answers is not None:
            if ended:
                return
            answers.append(torch.rand(3))
            drawn.release()

    def draw():
        told.release()
        drawn.acquire()

    ended = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield draw, answers
    ended.append(True)
    told.release()
    thread.join()


class Asking(Paying):
    ask = None

    def pays(self, td):
        Asking.ask()
        return super().pays(td)


def test_beside_another_thread_the_same_returns_are_measured_and_its_draws_are_left_alone(beside, tmp_path):
    draw, answers = beside
    Asking.ask = draw
    net = acting(linear_policy())
    with Observer({"r": AblatedReturn(Asking, "module.0", episodes=2)}, when=At(0), into=tmp_path) as observer:
        torch.manual_seed(5)
        observer.step(net, states(), step=0)  # seven states are drawn as well
        draw()
        found = observer.buffer["r"].at(0)
        assert torch.equal(found["return_ablated"], torch.zeros(1, 2).double())
        assert (found["return_intact"] != 0).all()
        assert len(answers) == 2 * 2 * LENGTH + 1
    torch.manual_seed(5)
    states()
    assert torch.equal(torch.cat(answers), torch.cat([torch.rand(3) for _ in answers]))


@pytest.mark.parametrize(
    "options", [{"make_env": Noisy}, {"make_env": Shaken}, {"make_env": Paying, "exploration": "random"}], ids=repr
)
def test_drawing_beside_another_thread_is_refused_before_that_threads_numbers_change(options, beside):
    draw, answers = beside
    net = nn.Sequential(nn.Linear(OBS, 2), NormalParamExtractor())
    body = TensorDictModule(net, ["observation"], ["loc", "scale"])
    policy = ProbabilisticActor(body, ["loc", "scale"], distribution_class=TanhNormal)
    td = TensorDict(observation=torch.zeros(2, OBS), batch_size=[2])
    torch.manual_seed(5)
    with pytest.raises(SettingsError, match=r"draws from the random states that they share; .*background=True"):
        measured(AblatedReturn(layers=nn.Linear, **options), policy, td)
    draw()
    torch.manual_seed(5)
    assert torch.equal(answers[0], torch.rand(3))
    assert not Paying.opened
