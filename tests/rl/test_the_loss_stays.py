"""An observed loss does all that the bare one does, and nothing else: six losses, one by one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses import LOSSES, Case
from test_every_loss import bits, everything
from torch import nn
from torchrl.objectives import HardUpdate, SoftUpdate

from tdhook_train import At, Every, Observer
from tdhook_train.health import EffectiveRank
from tdhook_train.rl import ObservedLoss, observe_loss

NAMES = ["ClipPPOLoss", "SACLoss", "DQNLoss", "TD3Loss", "CQLLoss", "REDQLoss"]
WITH_TARGETS = NAMES[1:]
VMAPPED = ["SACLoss", "TD3Loss", "CQLLoss", "REDQLoss"]

# what the bare loss says of itself as well
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater has been associated:UserWarning")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def observer(tmp_path):
    with Observer({"rank": EffectiveRank()}, when=Every(optim_steps=1) | At(0), into=tmp_path) as observer:
        yield observer


def pair(name: str, observer: Observer, prepare: Callable[[Case], Any] | None = None) -> tuple[Case, Case]:
    """Build a loss twice, do the same to both, and observe the second."""
    bare, watched = LOSSES[name](), LOSSES[name]()
    assert ObservedLoss(watched.loss, observer) is watched.loss
    for case in (bare, watched):
        if prepare is not None:
            prepare(case)
    return bare, watched


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, bit for bit, or what it raises."""
    torch.manual_seed(5)
    try:
        given = call()
    except Exception as error:  # also what a bare loss refuses must be refused alike
        return type(error), str(error)
    return bits(given.to_dict() if hasattr(given, "to_dict") else given), bits(torch.get_rng_state())


def losses_of(case: Case) -> Any:
    return outcome(lambda: case.loss(case.batch.clone()))


def test_it_has_the_same_keys_parameters_and_buffers(name, observer):
    bare, watched = pair(name, observer)
    assert list(bare.loss.state_dict()) == list(watched.loss.state_dict())
    for kind in ("named_parameters", "named_buffers", "named_modules"):
        assert [n for n, _ in getattr(bare.loss, kind)()] == [n for n, _ in getattr(watched.loss, kind)()]
    assert (bare.loss.in_keys, bare.loss.out_keys) == (watched.loss.in_keys, watched.loss.out_keys)
    assert type(watched.loss) is type(bare.loss)
    assert losses_of(bare) == losses_of(watched)
    assert observer.buffer["rank"].steps.tolist() == [0]


def test_checkpoints_go_from_the_bare_loss_to_the_observed_one_and_back(name, observer):
    bare, watched = pair(name, observer, losses_of)  # called once: REDQ's has one more buffer from then on
    optimizer = torch.optim.SGD(bare.loss.parameters(), 0.1)
    bare.update(optimizer)
    state = copy.deepcopy(bare.loss.state_dict())
    assert bits(dict(watched.loss.state_dict())) != bits(dict(state))
    watched.loss.load_state_dict(state)
    assert losses_of(bare) == losses_of(watched)
    fresh = LOSSES[name]()
    losses_of(fresh)
    fresh.loss.load_state_dict(watched.loss.state_dict())
    assert bits(dict(fresh.loss.state_dict())) == bits(dict(state))


def test_keys_and_value_estimators_can_still_be_set(name, observer):
    def prepare(case: Case) -> None:
        case.batch["next", "pay"] = case.batch["next", "reward"] * 2
        case.loss.set_keys(reward="pay")
        case.loss.make_value_estimator(gamma=0.5)

    bare, watched = pair(name, observer, prepare)
    plain = LOSSES[name]()
    assert losses_of(bare) == losses_of(watched)
    assert watched.loss.tensor_keys.reward == "pay"
    if name != "ClipPPOLoss":  # whose batch holds an advantage
        assert losses_of(plain) != losses_of(watched)


@pytest.mark.parametrize("name", WITH_TARGETS)
@pytest.mark.parametrize("updater", [SoftUpdate, HardUpdate])
def test_targets_follow(name, updater, observer):
    ends = []
    for case in pair(name, observer):
        optimizer = torch.optim.SGD(case.loss.parameters(), 0.1)
        targets = updater(
            case.loss, **({"tau": 0.5} if updater is SoftUpdate else {"value_network_update_interval": 2})
        )
        torch.manual_seed(5)
        for _ in range(3):
            sum(v.sum() for k, v in case.loss(case.batch.clone()).items() if k.startswith("loss")).backward()
            optimizer.step()
            optimizer.zero_grad()
            targets.step()
        ends.append(everything(case, optimizer))
    bare, watched = ends
    bare["hooks"] = watched["hooks"]  # the one on the loss, which the next test is about
    assert watched == bare
    assert len(observer.buffer["rank"]) == 3


def test_taking_the_handle_off_leaves_the_loss_the_optimizer_and_the_optimizers_steps_as_they_were(name, observer):
    bare, watched = LOSSES[name](), LOSSES[name]()
    ends = []
    for case in (bare, watched):
        optimizer = torch.optim.Adam(case.loss.parameters(), 0.01)
        if case is watched:
            handle = observe_loss(case.loss, observer, optimizer=optimizer)
            assert case.loss._forward_pre_hooks
            assert optimizer._optimizer_step_post_hooks
        torch.manual_seed(5)
        case.update(optimizer)
        if case is watched:
            handle.remove()
        case.update(optimizer)
        hooks = [len(value) for key, value in vars(optimizer).items() if key.endswith("_hooks")]
        ends.append((everything(case, optimizer), hooks, set(vars(case.loss))))
    assert ends[0] == ends[1]
    assert observer.buffer["rank"].steps.tolist() == [0]


def test_it_can_be_converted_to_another_dtype(name, observer):
    def prepare(case: Case) -> None:
        case.loss.to(torch.float64)
        case.batch.update(case.batch.apply(lambda v: v.double() if v.is_floating_point() else v))

    bare, watched = pair(name, observer, prepare)
    assert losses_of(bare) == losses_of(watched)
    assert {p.dtype for p in watched.loss.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", VMAPPED)
@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_the_randomness_of_members_can_be_chosen(name, randomness, observer):
    def prepare(case: Case) -> None:
        case.loss.set_vmap_randomness(randomness)

    bare, watched = pair(name, observer, prepare)
    assert losses_of(bare) == losses_of(watched)
    assert watched.loss.vmap_randomness == randomness


@pytest.mark.parametrize("name", VMAPPED)
def test_members_can_be_called_one_by_one(name, observer):
    def prepare(case: Case) -> None:
        case.loss.deactivate_vmap = True
        case.loss.set_vmap_randomness("different")  # makes the calls of members anew

    bare, watched = pair(name, observer, prepare)
    assert losses_of(bare) == losses_of(watched)


def pickled(loss: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(loss))


def saved(loss: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled, saved])
def test_copies_are_those_of_a_bare_loss(name, way, observer):
    bare, watched = pair(name, observer)
    given = []
    for case in (bare, watched):
        try:
            twin = way(case.loss)
        except Exception as error:  # what does not pickle bare need not observed, and says the same
            given.append((type(error), str(error)))
            continue
        given.append((outcome(lambda: twin(case.batch.clone())), bits(dict(twin.state_dict()))))  # noqa: B023
    assert given[0] == given[1]
    assert "rank" not in observer.buffer  # copies are not observed


def compiled_training(case: Case, observer: Observer | None, **options: Any) -> Any:
    """Train compiled; return what that leaves."""
    optimizer = torch.optim.SGD(case.loss.parameters(), 0.1)
    if observer is not None:
        ObservedLoss(case.loss, observer, optimizer)
    torch._dynamo.reset()
    loss = torch.compile(case.loss, backend="aot_eager", **options)
    torch.manual_seed(5)
    for _ in range(3):
        sum(v.sum() for k, v in loss(case.batch.clone()).items() if k.startswith("loss")).backward()
        optimizer.step()
        optimizer.zero_grad()
    return bits(dict(case.loss.state_dict())), bits(torch.get_rng_state())


COMPILED = [
    *[(name, True) for name in NAMES if name not in ("CQLLoss", "REDQLoss")],
    ("SACLoss", False),
]  # the two take half a minute each


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fullgraph"), COMPILED)
def test_compiled_it_trains_to_the_same_bits_and_is_measured_at_each_step(name, fullgraph, observer):
    bare = compiled_training(LOSSES[name](), None, fullgraph=fullgraph)
    assert compiled_training(LOSSES[name](), observer, fullgraph=fullgraph) == bare
    assert observer.buffer["rank"].steps.tolist() == [0, 1, 2]
