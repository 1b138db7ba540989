"""What another thread does meanwhile, such as a collector that acts by the same policy, is what it would have done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from losses import LOSSES, Case
from tensordict import TensorDict
from tensordict.nn import InteractionType, probabilistic, set_interaction_type
from tensordict.nn.probabilistic import interaction_type
from torch import nn
from tqdm import tqdm

from tdhook_train import At, Method, Observer
from tdhook_train.attribution import Saliency
from tdhook_train.health import EffectiveRank
from tdhook_train.isolation.acting import deterministic
from tdhook_train.rl import ObservedLoss


class Other(threading.Thread):
    """Another thread, which does one thing at a time when it is asked to."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._asked, self._answered, self._job = threading.Event(), threading.Event(), None
        self.answers: list[Any] = []

    def run(self) -> None:
        while self._asked.wait() and self._job is not None:
            self._asked.clear()
            self.answers.append(self._job())
            self._answered.set()

    def do(self, job: Callable[[], Any]) -> Any:
        self._job = job
        self._asked.set()
        self._answered.wait()
        self._answered.clear()
        return self.answers[-1]

    def end(self) -> None:
        self._job = None
        self._asked.set()
        self.join()


@pytest.fixture
def other():
    thread = Other()
    thread.start()
    yield thread
    thread.end()


@dataclass(frozen=True)
class Asks(Method):
    """Lets the other thread do something in the middle of a pass, and between passes."""

    ask: Any = None

    writes: ClassVar = {"seen": "layer"}

    def taps(self, model: Any) -> Any:
        return model.sites("**")

    def measure(self, seen: Any, model: Any) -> TensorDict:
        def ask(value: torch.Tensor) -> torch.Tensor:
            self.ask()
            return value.clone()

        self.ask()
        with model.run(seen.batch) as run:
            run.set(self.taps(model)[0], ask)
        return TensorDict({"seen": torch.zeros(len(self.taps(model)))})


def measured(case: Case, tmp_path: Any, other: Other, job: Callable[[], Any]) -> Observer:
    methods = {"rank": EffectiveRank(), "asks": Asks(ask=partial(other.do, job)), "attribution": Saliency()}
    observer = Observer(methods, when=At(0), into=tmp_path)
    observer.step(case.loss, case.batch, step=0)
    return observer


@dataclass
class AsksWhenCopied:
    ask: Callable[[], Any]

    def __deepcopy__(self, _: Any) -> None:
        self.ask()


def test_the_other_threads_random_numbers_are_those_of_a_run_without_an_observer(other, tmp_path):
    case = LOSSES["SACLoss"]()
    case.loss.actor_network.part = AsksWhenCopied(partial(other.do, lambda: torch.rand(4)))
    torch.manual_seed(3)
    other.do(lambda: torch.rand(4))
    with measured(case, tmp_path, other, lambda: torch.rand(4)):
        pass
    other.do(lambda: torch.rand(4))
    drawn, state = torch.cat(other.answers), torch.get_rng_state()
    assert len(drawn) > 40
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.cat([torch.rand(4) for _ in other.answers]))
    assert torch.equal(state, torch.get_rng_state())


def test_the_other_threads_policy_acts_as_it_was_told_to(other, tmp_path):
    with measured(LOSSES["SACLoss"](), tmp_path, other, interaction_type):
        assert len(other.answers) == 10  # twice for each network
        assert set(other.answers) == {None}
    with (
        set_interaction_type(InteractionType.MEAN),
        measured(LOSSES["DQNLoss"](), tmp_path / "in", other, interaction_type),
    ):
        assert set(other.answers) == {None, InteractionType.MEAN}


def test_what_the_other_thread_tells_its_policy_is_neither_measured_nor_undone(other, tmp_path):
    case = LOSSES["ClipPPOLoss"]()
    told = set_interaction_type(InteractionType.RANDOM)
    actions = []

    @dataclass(frozen=True)
    class Acts(Asks):
        def measure(self, seen: Any, model: Any) -> TensorDict:
            other.do(told.__enter__)
            actions.append(model(seen.batch)["action"])
            return super().measure(seen, model)

    methods = {"acts": Acts(networks="actor_network", ask=partial(other.do, interaction_type))}
    with Observer(methods, when=At(0), into=tmp_path) as observer:
        ObservedLoss(case.loss, observer)(case.batch)
    assert other.answers[-1] is InteractionType.RANDOM
    assert interaction_type() is InteractionType.RANDOM  # as the other thread has left it
    other.do(lambda: told.__exit__(None, None, None))
    assert interaction_type() is None
    with set_interaction_type(InteractionType.DETERMINISTIC), torch.no_grad():
        assert torch.equal(actions[0], case.loss.actor_network(case.batch.clone())["action"])


def test_two_threads_that_measure_at_once_put_tensordicts_mode_back_whichever_ends_first(other):
    before = probabilistic._interaction_type
    mine, theirs = deterministic(), deterministic()
    with set_interaction_type(InteractionType.RANDOM):
        mine.__enter__()
        assert other.do(interaction_type) is InteractionType.RANDOM
        other.do(theirs.__enter__)
        assert other.do(interaction_type) is interaction_type() is InteractionType.DETERMINISTIC
        mine.__exit__(None, None, None)
        assert interaction_type() is InteractionType.RANDOM
        assert other.do(interaction_type) is InteractionType.DETERMINISTIC
        other.do(lambda: theirs.__exit__(None, None, None))
        assert other.do(interaction_type) is InteractionType.RANDOM
    assert probabilistic._interaction_type is before
    assert interaction_type() is None


class Noisy(nn.Module):
    """Draws whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + torch.randn(2)


@dataclass(frozen=True)
class Output(Method):
    writes: ClassVar = {"out": "batch unit"}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        with model.run(seen.batch) as run:
            pass
        return TensorDict({"out": run.output["output"]})


@pytest.mark.parametrize("busy", [True, False])
def test_a_network_that_draws_still_draws_by_seed_and_step(busy, request, tmp_path):
    if busy:
        request.getfixturevalue("other")
    torch.manual_seed(0)
    net, batch = Noisy(), TensorDict(input=torch.ones(5, 3), batch_size=[5])
    rows = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with Observer({"out": Output()}, when=At(0), into=tmp_path / str(seed)) as observer:
            observer.attach(net, in_keys=["input"], out_keys=["output"])
            observer.step(net, batch, step=0)
            rows.append(observer.buffer["out"].at(0)["out"])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*rows)


@dataclass(frozen=True)
class Careless(Method):
    """Draws from the generator that is everybody's."""

    writes: ClassVar = {"drawn": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return TensorDict({"drawn": torch.rand(())})


def test_a_method_that_draws_from_everybodys_generator_leaves_the_training_alone_under_a_progress_bar(tmp_path):
    case = LOSSES["DQNLoss"]()
    with tqdm(total=1, mininterval=0) as bar, Observer({"c": Careless()}, when=At(0), into=tmp_path) as observer:
        assert bar.monitor is not None  # a thread
        before = torch.get_rng_state()
        observer.step(case.loss, case.batch, step=0)
        assert torch.equal(torch.get_rng_state(), before)
