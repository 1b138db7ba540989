"""A process in the background that is interrupted, closed, cut off or begun twice: nothing hangs, nothing is wrong."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import At, Every, Method, Observer, ProbeSet
from tdhook_train.errors import NetworkError, WorkerError

pytestmark = pytest.mark.slow  # each begins a process of its own

EVERY_STEP = At(0) | Every(optim_steps=1)


@dataclass(frozen=True)
class Seen(Method):
    """A weight and what the batch holds, once a file is there."""

    gate: str = ""
    fails: tuple[int, ...] = ()

    writes: ClassVar = {"weight": "", "input": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        while self.gate and not Path(self.gate).exists():
            time.sleep(0.01)
        if seen.clock.step in self.fails:
            raise ZeroDivisionError(f"broken at {seen.clock.step}")
        weight = next(model.module.parameters()).detach().flatten()[0].clone()
        return TensorDict({"weight": weight, "input": seen.batch["input"].sum()})


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    before = children(), len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert (children(), len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def made(rows: int = 4) -> tuple[nn.Linear, TensorDict]:
    return nn.Linear(3, 1), TensorDict(input=torch.ones(rows, 3), batch_size=[rows])


def test_who_closed_an_observer_in_the_middle_may_go_on_training(tmp_path):
    model, td = made()
    observer = Observer({"s": Seen(str(tmp_path / "never"))}, when=EVERY_STEP, into=tmp_path / "r", background=True)

    def interrupted() -> None:
        with observer:
            observer.step(model, td, step=0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not observer.step(model, td, step=1)
    assert not observer.finish(step=1)
    observer.close()


def test_an_error_at_the_end_loses_no_row_that_was_measured(tmp_path):
    model, td = made()
    methods = {"s": Seen(), "a": Seen(fails=(1, 3)), "b": Seen(fails=(1,))}
    observer = Observer(methods, when=EVERY_STEP, into=tmp_path, background=100)
    observer.attach(model)
    worker = observer._ticks._worker
    worker._exchange, exchange = (lambda **_: None), worker._exchange  # nothing comes for a while
    worker._begun = 2
    for step in range(5):
        observer.step(model, td, step=step)
    worker._exchange, worker._begun = exchange, 0
    with pytest.raises(ZeroDivisionError, match="broken at 1"):
        observer.finish(step=5)
    assert observer.buffer["s"].steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert observer.buffer["a"].steps.tolist() == [0, 2, 4, 5]
    errors = [(event["step"], event["row"]) for event in observer.buffer.events("error")]
    assert errors == [(1, "a"), (1, "b"), (3, "a")]
    observer.close()


def test_a_message_that_was_cut_off_ends_the_process_rather_than_confuse_it(tmp_path, monkeypatch):
    model, td = made()
    sent = Connection.send_bytes

    def cut(self: Connection, message: bytes) -> None:
        self._send(message[:100])
        raise KeyboardInterrupt

    with Observer({"s": Seen()}, when=EVERY_STEP, into=tmp_path, background=True) as observer:
        observer.step(model, td, step=0)
        observer.state_dict()
        monkeypatch.setattr(Connection, "send_bytes", cut)
        with pytest.raises(KeyboardInterrupt):
            observer.step(model, td, step=1)
        monkeypatch.setattr(Connection, "send_bytes", sent)
        with pytest.raises(WorkerError, match="ended"):
            observer.step(model, td, step=2)
        observer.state_dict()
        assert observer.buffer["s"].steps.tolist() == [0]


def test_an_interrupted_wait_may_be_waited_for_again(tmp_path):
    model, td = made()
    gate = tmp_path / "gate"
    with Observer({"s": Seen(str(gate))}, when=EVERY_STEP, into=tmp_path / "r", background=True) as observer:
        observer.step(model, td, step=0)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 4.0)  # whether or not the process has begun to measure by then
        try:
            with pytest.raises(KeyboardInterrupt):
                observer.state_dict()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        gate.touch()
        observer.state_dict()
        assert observer.buffer["s"].steps.tolist() == [0]


def test_a_probe_set_whose_sending_was_interrupted_is_sent_again(tmp_path, monkeypatch):
    model, td = made()
    dumps = pickle.dumps
    with Observer({"s": Seen()}, when=EVERY_STEP, into=tmp_path, on=ProbeSet(td), background=True) as observer:
        observer.attach(model)

        def interrupted(_: Any) -> bytes:
            raise KeyboardInterrupt

        monkeypatch.setattr(pickle, "dumps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            observer.step(model, td, step=0)
        monkeypatch.setattr(pickle, "dumps", dumps)
        observer.step(model, td, step=1)
        observer.state_dict()
        assert observer.buffer["s"].steps.tolist() == [1]


def test_to_attach_twice_begins_one_process_and_loses_no_row(tmp_path):
    model, td = made()
    before = children()
    with Observer({"s": Seen()}, when=EVERY_STEP, into=tmp_path, background=True) as observer:
        observer.attach(model)
        begun = children()
        observer.step(model, td, step=0)
        observer.attach(model)
        assert children() == begun
        observer.step(model, td, step=1)
        observer.state_dict()
        assert observer.buffer["s"].steps.tolist() == [0, 1]
    assert len(begun - before) == 1


class Connected:
    def __deepcopy__(self, memo: Any) -> Connected:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a connection is of its process")


def test_who_cannot_measure_beside_the_training_does_not_measure_within_it(tmp_path):
    model, td = made()
    model.connection = Connected()
    with Observer({"s": Seen()}, when=EVERY_STEP, into=tmp_path, background=True) as observer:
        for step in range(2):
            with pytest.raises(NetworkError, match="cannot be sent"):
                observer.step(model, td, step=step)
        assert "s" not in observer.buffer


def test_more_than_a_socket_holds_goes_to_and_fro(tmp_path):
    model = nn.Linear(1000, 500)
    td = TensorDict(input=torch.randn(300, 1000), batch_size=[300])
    with Observer({"s": [Whole()]}, when=EVERY_STEP, into=tmp_path, background=2) as observer:
        for step in range(3):
            observer.step(model, td, step=step)
            observer.state_dict()
        found = observer.buffer["s"].series("all")
        assert torch.equal(found, model.weight.detach().expand_as(found))


@dataclass(frozen=True)
class Whole(Method):
    writes: ClassVar = {"all": "unit feature"}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return TensorDict({"all": model.module.weight.detach().clone()})


@dataclass(frozen=True)
class Sums(Method):
    """Adds up in no order that is the same each time, as far as torch says."""

    writes: ClassVar = {"warns": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return TensorDict({"warns": torch.tensor(float(torch.is_deterministic_algorithms_warn_only_enabled()))})


def test_what_only_warns_in_the_training_only_warns_beside_it(tmp_path):
    model, td = made()
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        with Observer({"s": Sums()}, when=EVERY_STEP, into=tmp_path, background=2) as observer:
            observer.step(model, td, step=0)
            observer.finish(step=0)
            assert observer.buffer["s"].at(0)["warns"] == 1
    finally:
        torch.use_deterministic_algorithms(mode=False)


@pytest.mark.parametrize("where", ["memory-mapped", "shared"])
def test_a_snapshot_is_of_its_moment_wherever_its_tensors_lie(where, tmp_path):
    model, td = made()
    if where == "shared":
        model.share_memory()
    td = td.memmap_(str(tmp_path / "td")) if where == "memory-mapped" else td.share_memory_()
    gate = tmp_path / "gate"
    with Observer({"s": Seen(str(gate))}, when=EVERY_STEP, into=tmp_path / "r", background=8) as observer:
        weight = model.weight.detach().flatten()[0].item()
        for step in range(2):
            observer.step(model, td, step=step)
        td["input"].fill_(2)
        with torch.no_grad():
            model.weight.fill_(7)
        gate.touch()
        observer.state_dict()
        assert observer.buffer["s"].series("input").tolist() == [12, 12]
        assert observer.buffer["s"].series("weight").tolist() == [weight, weight]


def test_what_a_fork_of_the_training_ends_is_not_the_process(tmp_path):
    model, td = made()
    with Observer({"s": Seen()}, when=EVERY_STEP, into=tmp_path, background=8) as observer:
        observer.step(model, td, step=0)
        if (child := os.fork()) == 0:
            observer._ticks.close()
            os._exit(0)
        os.waitpid(child, 0)
        observer.step(model, td, step=1)
        observer.state_dict()
        assert observer.buffer["s"].steps.tolist() == [0, 1]
