"""Measuring in a process of its own gives the numbers of measuring in the training, and leaves nothing behind."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from losses import LOSSES, Case
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_train import ArtifactBuffer, At, Every, Method, Observer, ProbeSet
from tdhook_train.attribution import IntegratedGradients
from tdhook_train.errors import NetworkError, SettingsError, WorkerError
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import ActivationPatching, RidgeProbe
from tdhook_train.rl import ObservedLoss

EVERY_STEP = At(0) | Every(optim_steps=1)


@dataclass(frozen=True)
class Weight(Method):
    """A weight and a draw, once a file is there."""

    gate: str = ""

    writes: ClassVar = {"weight": "", "drawn": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        while self.gate and not Path(self.gate).exists():
            time.sleep(0.01)
        drawn = torch.rand((), generator=seen.generator)
        return TensorDict({"weight": next(model.module.parameters()).detach().flatten()[0].clone(), "drawn": drawn})


class Unreadable(Exception):
    """Can be pickled, and then not read."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


@dataclass(frozen=True)
class Fails(Weight):
    at: int = 1
    kind: str = "ZeroDivisionError"

    def measure(self, seen: Any, model: Any) -> TensorDict:
        if seen.clock.step == self.at:
            if self.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("broken on purpose") if self.kind == "ZeroDivisionError" else Unreadable("a", "b")
        return super().measure(seen, model)


class Noisy(nn.Module):
    """A network that draws in evaluation too, and has buffers that a pass in training mode would move."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 0.01 * torch.randn(len(x), 2)


def children() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.add(int(path.parent.name))
    return found


@pytest.fixture(autouse=True)
def _no_process_is_left_behind():
    before = children()
    yield
    assert children() <= before


def trained(case: Case, observer: Observer, steps: int) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(case.loss.parameters(), 0.01)
    ObservedLoss(case.loss, observer, optimizer)
    for _ in range(steps):
        case.update(optimizer)
    observer.finish()
    return {name: value.clone() for name, value in case.loss.state_dict().items()}


def rows(path: Path) -> dict[str, Any]:
    """Everything but when and at what cost."""
    with ArtifactBuffer.open(path) as buffer:
        out: dict[str, Any] = {}
        for name in buffer:
            for key, value in buffer[name][:].items(include_nested=True, leaves_only=True):
                if key[-1] not in ("time", "cost"):
                    out[name, key] = value.numpy().tobytes()
            out[name, "coords"] = buffer[name].coords
    return out


@pytest.mark.parametrize("name", ["ClipPPOLoss", pytest.param("SACLoss", marks=pytest.mark.slow)])
def test_the_numbers_are_those_of_the_foreground_bit_for_bit(name, tmp_path):
    scale = 2.0  # a closure of this function goes to the other process as well
    probe = RidgeProbe(target={"scaled": lambda td: td["observation"][:, 0] * scale}, shifts=19, folds=2)
    methods = {"probe": probe, "ig": IntegratedGradients(rows=4), "several": [EffectiveRank(), Weight()]}
    methods["patching"] = ActivationPatching(pairs=4)
    found, weights, rng = {}, {}, {}
    for background in (False, 100):
        case = LOSSES[name]()
        batch = torch.cat([case.batch + 0.1 * i for i in range(8)]).float()
        fixed = ProbeSet(batch, groups=torch.arange(len(batch)) // 8)
        where = tmp_path / str(background)
        on = {"fixed": fixed, "now": "batch"}
        safe = {row: method for row, method in methods.items() if row != "probe"}
        torch.manual_seed(0)
        with (
            Observer(methods, when=EVERY_STEP, into=where, on=fixed, background=background) as observer,
            Observer(safe, when=EVERY_STEP, into=where / "two", on=on, background=background) as other,
        ):
            ObservedLoss(case.loss, other)
            weights[background] = trained(case, observer, 4)
            other.finish(step=4)
            assert observer.meter.dropped == 0
        rng[background] = torch.get_rng_state()
        found[background] = rows(where) | {("two", *key): value for key, value in rows(where / "two").items()}
    assert found[100].keys() == found[False].keys()
    assert [key for key, value in found[False].items() if found[100][key] != value] == []
    assert weights[False].keys() == weights[100].keys()
    assert all(torch.equal(value, weights[100][key]) for key, value in weights[False].items())
    assert torch.equal(rng[False], rng[100])


@dataclass(frozen=True)
class Settings(Method):
    """What decides how numbers come out."""

    writes: ClassVar = {"threads": "", "made": "", "high": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        high = torch.get_float32_matmul_precision() == "high" and torch.are_deterministic_algorithms_enabled()
        return TensorDict({"threads": torch.tensor(torch.get_num_threads()), "made": torch.ones(()), "high": high})


def test_the_process_computes_as_the_training_does(tmp_path):
    model, td = nn.Linear(3, 1), TensorDict(input=torch.randn(4, 3), batch_size=[4])
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        stack.callback(torch.use_deterministic_algorithms, mode=False)
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("high")
        torch.use_deterministic_algorithms(mode=True)
        with Observer({"s": Settings()}, when=At(0), into=tmp_path, background=True) as observer:
            observer.step(model, td, step=0)
            observer.finish(step=0)
            row = observer.buffer["s"].at(0)
    assert row["threads"] == 3
    assert row["made"].dtype == torch.float64
    assert row["high"]


def test_a_module_that_draws_and_normalises_is_measured_alike(tmp_path):
    td = TensorDict(input=torch.randn(20, 3), y=torch.randn(20), batch_size=[20])
    found = {}
    for background in (False, True):
        torch.manual_seed(0)
        model = Noisy()
        with Observer(
            {"w": [Weight(), EffectiveRank()]}, when=EVERY_STEP, into=tmp_path / str(background), background=background
        ) as observer:
            for step in range(4):
                observer.step(model, td, step=step)
                model(td["input"])  # moves the statistics
            observer.finish(step=4)
        found[background] = rows(tmp_path / str(background))
        found[background]["rng"] = torch.get_rng_state().tolist()
    assert found[True] == found[False]


def test_what_there_is_no_room_for_is_dropped_counted_and_noted(tmp_path):
    gate, model, td = tmp_path / "gate", nn.Linear(3, 1), TensorDict(input=torch.randn(4, 3), batch_size=[4])
    observer = Observer({"w": Weight(str(gate))}, when=EVERY_STEP, into=tmp_path / "run", background=2)
    done = [observer.step(model, td, step=step) for step in range(8)]
    # one is being measured and two wait; which moment the worker was ready at is not for the test to know
    assert done == sorted(done, reverse=True)
    assert 3 <= sum(done) <= 4
    assert observer.meter.dropped == 8 - sum(done)
    assert len(observer.buffer) == 0
    gate.touch()
    with torch.no_grad():
        model.weight.fill_(7.0)  # a snapshot is of its moment
    observer.finish(step=9)
    kept = [step for step, handed in enumerate(done) if handed]
    assert observer.buffer["w"].steps.tolist() == [*kept, 9]
    assert (observer.buffer["w"].series("weight") == 7).tolist() == [False] * len(kept) + [True]
    skips = [event for event in observer.buffer.events("skip") if event["why"] == "background"]
    assert [event["step"] for event in skips] == [step for step in range(8) if step not in kept]
    observer.close()


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("ZeroDivisionError", ZeroDivisionError, "broken on purpose"),
        ("Unreadable", WorkerError, "Unreadable: ab"),
        ("killed", WorkerError, "ended with exit code -9"),
    ],
)
def test_an_error_reaches_the_training_at_a_later_step_and_loses_no_other_row(kind, error, said, tmp_path):
    model, td = nn.Linear(3, 1), TensorDict(input=torch.randn(4, 3), batch_size=[4])
    methods = {"w": Weight(), "f": Fails(kind=kind)}
    with Observer(methods, when=EVERY_STEP, into=tmp_path, background=True) as observer:
        observer.step(model, td, step=0)
        observer.step(model, td, step=1)
        with pytest.raises(error, match=said):
            observer.finish(step=1)
        assert observer.buffer["f"].steps.tolist() == [0]
        assert observer.buffer["w"].steps.tolist() == ([0] if kind == "killed" else [0, 1])
        (event,) = observer.buffer.events("error")
        assert event["step"] == 1
        assert said in event["error"]


def test_an_error_that_is_to_be_warned_of_stops_nothing(tmp_path):
    model, td = nn.Linear(3, 1), TensorDict(input=torch.randn(4, 3), batch_size=[4])
    methods = {"f": [Fails(at=1)], "killed": Fails(at=3, kind="killed")}
    with Observer(methods, when=EVERY_STEP, into=tmp_path, background=True, on_error="warn") as observer:
        for step in range(2):
            observer.step(model, td, step=step)
        with pytest.warns(UserWarning, match="measuring 'f' at step 1 failed: broken on purpose"):
            observer.state_dict()  # waits for what is under way
        observer.step(model, td, step=2)
        observer.step(model, td, step=3)
        with pytest.warns(UserWarning, match="measuring 'background' at step 3 failed: the process that measures"):
            observer.finish(step=3)
        with pytest.warns(UserWarning, match="exit code -9"):
            assert not observer.step(model, td, step=4)
        assert observer.buffer["f"].steps.tolist() == [0, 2]
        assert observer.buffer["killed"].steps.tolist() == [0, 1, 2]


def test_whoever_leaves_by_an_error_does_not_wait(tmp_path):
    model, td = nn.Linear(3, 1), TensorDict(input=torch.randn(4, 3), batch_size=[4])
    methods = {"w": Weight(str(tmp_path / "never"))}

    def interrupted() -> None:
        with Observer(methods, when=EVERY_STEP, into=tmp_path / "run", background=True) as observer:
            observer.step(model, td, step=0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_a_checkpoint_waits_for_rows_and_what_follows_it_is_measured_again(tmp_path):
    case = LOSSES["ClipPPOLoss"]()
    optimizer = torch.optim.Adam(case.loss.parameters(), 0.01)
    found = []
    with Observer({"w": Weight()}, when=EVERY_STEP, into=tmp_path, background=50) as observer:
        ObservedLoss(case.loss, observer, optimizer)
        for _ in range(3):
            case.update(optimizer)
        kept = copy.deepcopy((case.loss.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
        state = observer.state_dict()
        assert observer.buffer["w"].steps.tolist() == [0, 1, 2]
        for _ in range(2):
            for _ in range(3):
                case.update(optimizer)
            observer.finish()
            found.append(observer.buffer["w"].series(("actor_network", "weight")).tolist())
            assert observer.buffer["w"].steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
            case.loss.load_state_dict(kept[0])
            optimizer.load_state_dict(copy.deepcopy(kept[1]))
            torch.set_rng_state(kept[2])
            observer.load_state_dict(state)
            assert observer.buffer["w"].steps.tolist() == [0, 1, 2]
    assert found[0] == found[1]


class Connected:
    def __deepcopy__(self, memo: Any) -> Connected:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a connection is of its process")


def test_what_cannot_be_sent_is_refused_when_the_observer_is_attached(tmp_path):
    model = nn.Linear(3, 1)
    model.connection = Connected()
    with Observer({"w": Weight()}, when=EVERY_STEP, into=tmp_path, background=True) as observer:
        with pytest.raises(NetworkError, match="cannot be sent: a connection is of its process"):
            observer.attach(model)
        assert "weights.pt" in {path.name for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("given", [-1, "yes", 0.5])
def test_a_number_of_snapshots_is_asked_for(given, tmp_path):
    with pytest.raises(SettingsError, match="how many snapshots may wait"):
        Observer({"w": Weight()}, when=EVERY_STEP, into=tmp_path, background=given)


SCRIPT = """
    import sys, time, torch
    from dataclasses import dataclass
    from pathlib import Path
    from typing import ClassVar
    from tensordict import TensorDict
    from tdhook_train import ArtifactBuffer, Every, Method, Observer

    class Net(torch.nn.Module):  # of the script, which has no `if __name__ == "__main__"`
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def forward(self, x):
            return self.layer(x) * 2

    @dataclass(frozen=True)
    class Mine(Method):
        writes: ClassVar = {"x": ""}

        def measure(self, seen, model):
            return TensorDict({"x": seen.batch["output"].mean()})

    print("begun")
    observer = Observer({"mine": Mine()}, when=Every(optim_steps=1), into=sys.argv[1], background=True)
    net, td = Net(), TensorDict(input=torch.ones(4, 3), batch_size=[4])
    for step in range(3):
        observer.step(net, td, step=step)
    observer.state_dict()
    print(observer.buffer["mine"].steps.tolist(), flush=True)
    if sys.argv[2] == "wait":
        time.sleep(600)
"""


def test_a_script_needs_no_guard_and_its_own_classes_are_measured_with(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run"), "end"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["begun", "[1, 2]"]  # once, and it ended without close()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_training_that_is_interrupted_or_killed_takes_its_process_along(sent, tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run"), "wait"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == "begun\n"
        training.stdout.readline()
        group = training.pid
        os.killpg(group, sent) if sent == signal.SIGINT else training.send_signal(sent)
        training.wait(60)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)  # is anybody of the session left?
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the process in the background outlived its training")
