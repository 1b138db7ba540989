"""Several processes give the rows of one, and leave nothing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sweeps import calls, methods, net, run, write

from tdhook_train.checkpoints import differences
from tdhook_train.errors import CheckpointError, WorkerError

STEPS = range(0, 36, 3)


def children() -> set[int]:
    """The processes that this one has started, but for the one that clears up behind others."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            command = (path.parent / "cmdline").read_text()
        except OSError:  # it is gone
            continue
        if parent == os.getpid() and command and "resource_tracker" not in command:
            found.add(int(path.parent.name))
    return found


def shared() -> set[str]:
    """What this process has in shared memory; of other tests there may be something."""
    return {name for name in os.listdir("/dev/shm") if f"-{os.getpid()}-" in name or f"_{os.getpid()}_" in name}


@pytest.fixture(autouse=True)
def nothing_left():
    before = children(), shared()
    yield
    gc.collect()
    assert children() <= before[0]
    assert shared() <= before[1]


@pytest.fixture
def one(tmp_path):
    run(write(tmp_path / "ckpt", STEPS), tmp_path / "one", methods(tmp_path / "calls"))
    (tmp_path / "calls").unlink()
    return tmp_path / "one"


def test_the_same_rows_by_several(one, tmp_path):
    run(tmp_path / "ckpt", tmp_path / "two", methods(tmp_path / "calls"), workers=2)
    assert differences(one, tmp_path / "two") == []
    assert set(calls(tmp_path / "calls")) == set(STEPS)
    workers = {line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()}
    assert len(workers) == 2
    assert str(os.getpid()) in workers


@pytest.mark.slow
@pytest.mark.parametrize("broken", [[0], [9], [12, 15], [3, 6, 9, 12]])
def test_checkpoints_before_a_block_that_cannot_be_used_change_nothing(broken, tmp_path):
    write(tmp_path / "ckpt", STEPS)
    for step in broken:
        torch.save({"model": torch.nn.Linear(3, 4).state_dict(), "step": step}, tmp_path / "ckpt" / f"{step}.pt")
    for workers in (1, 2):
        run(
            tmp_path / "ckpt",
            tmp_path / str(workers),
            methods(tmp_path / "calls"),
            workers=workers,
            on_error="skip",
        )
    assert differences(tmp_path / "1", tmp_path / "2") == []


@pytest.mark.slow
def test_a_method_that_fails_before_a_block_changes_nothing(tmp_path):
    write(tmp_path / "ckpt", STEPS)
    for workers in (1, 2):
        given = methods(tmp_path / "calls", 9, "1 / 0")
        run(tmp_path / "ckpt", tmp_path / str(workers), given, workers=workers, on_error="skip")
    assert differences(tmp_path / "1", tmp_path / "2") == []


@pytest.mark.slow
def test_an_error_in_a_process_is_raised_here(tmp_path):
    write(tmp_path / "ckpt", STEPS)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "ckpt", tmp_path / "a", methods(tmp_path / "calls", 9, "1 / 0"), workers=2)


@pytest.mark.slow
def test_a_build_that_fails_in_a_process_is_said(one, tmp_path):
    from tdhook_train import sweep

    with pytest.raises(CheckpointError, match="gave a int, which is no module"):
        sweep(
            tmp_path / "ckpt",
            lambda: 3,
            methods(tmp_path / "calls"),
            one,
            tmp_path / "a",
            workers=2,
            progress=False,
        )


@pytest.mark.slow
def test_a_process_that_dies(one, tmp_path):
    dies = f"import os, signal; os.getpid() == {os.getpid()} or os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(WorkerError, match="a process that measures checkpoints ended"):
        run(tmp_path / "ckpt", tmp_path / "two", methods(tmp_path / "calls", 9, dies), workers=2)  # not here
    run(tmp_path / "ckpt", tmp_path / "two", methods(tmp_path / "calls"), workers=2)
    assert differences(one, tmp_path / "two") == []


SCRIPT = """
import sys
from dataclasses import dataclass
from typing import Any, ClassVar
import torch
from tensordict import TensorDict
from tdhook_train import Method, sweep

class Net(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()

@dataclass(frozen=True)
class Sum(Method):
    writes: ClassVar = {"sum": ""}
    def measure(self, seen, model):
        return TensorDict({"sum": model.module.weight.sum()})

def build():
    from torchrl.data import LazyTensorStorage, ReplayBuffer

    made = {"net": Net(2, 2), "beside": ReplayBuffer(storage=LazyTensorStorage(3))}  # which holds semaphores
    made["itself"] = made
    return made["net"]

td = TensorDict({"input": torch.ones(4, 2)}, [4])
states = [Net(2, 2).state_dict() for _ in range(6)]
for i, state in enumerate(states):
    torch.save(state, f"{i}.pt")
buffer = sweep("*.pt", build, {"sum": Sum()}, td, "run", workers=2, in_keys=["input"], progress=False)
assert buffer["sum"].series("sum").tolist() == [state["weight"].sum().item() for state in states]
print("done")
"""


@pytest.mark.slow
def test_a_script_needs_no_guard(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
    assert done.stderr == ""


INTERRUPTED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from sweeps import methods, run
from test_sweep_workers import children
does = f"import os, signal; os.kill({{os.getpid()}}, signal.SIGINT)"
try:
    run(Path({ckpt!r}), Path({into!r}), methods(Path({calls!r}), 9, does), workers=2)
except KeyboardInterrupt:
    print("interrupted", children())
"""


@pytest.mark.slow
def test_ctrl_c(one, tmp_path):
    script = INTERRUPTED.format(
        tests=str(Path(__file__).parent),
        ckpt=str(tmp_path / "ckpt"),
        into=str(tmp_path / "two"),
        calls=str(tmp_path / "calls"),
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "interrupted set()\n", done.stderr
    assert done.stderr == ""
    run(tmp_path / "ckpt", tmp_path / "two", methods(tmp_path / "calls"))
    assert differences(one, tmp_path / "two") == []


@pytest.mark.slow
def test_a_sweep_that_is_killed_leaves_no_process(tmp_path):
    write(tmp_path / "ckpt", STEPS)
    pids = tmp_path / "pids"
    does = f"import os, time, pathlib; pathlib.Path({str(pids)!r}).write_text(str(os.getpid())); time.sleep(60)"
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from sweeps import methods, run\n"
        f"run(Path({str(tmp_path / 'ckpt')!r}), Path({str(tmp_path / 'run')!r}), "
        f"methods(Path({str(tmp_path / 'calls')!r}), 9, {does!r}), workers=2)\n"
    )
    killed = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    while not (pids.exists() and pids.read_text()):
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    other = Path("/proc") / pids.read_text()
    assert other.name != str(killed.pid)
    for _ in range(100):
        if not other.exists() or ") Z " in (other / "stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the process goes on")


def test_what_cannot_be_sent_is_said(tmp_path):
    import threading

    lock = threading.Lock()

    def build():
        return net() if lock else None

    from sweeps import data

    from tdhook_train import sweep
    from tdhook_train.errors import SettingsError
    from tdhook_train.health import EffectiveRank

    with pytest.raises(SettingsError, match="workers=2 sends build, methods and data to processes: cannot pickle"):
        sweep(
            write(tmp_path / "ckpt", [1]),
            build,
            {"rank": EffectiveRank()},
            data(),
            tmp_path / "a",
            workers=2,
            in_keys=["input"],
            progress=False,
        )
