"""A writer may be killed at any line: old and new readers and the next writer then see the same whole rows."""

import itertools
import os
import shutil
import signal
import sys
import warnings

import pytest
import torch
from tensordict import TensorDict

from tdhook_train import buffer as package
from tdhook_train.buffer import ArtifactBuffer, row_writer

FOLDER = os.path.dirname(package.__file__)
WRITING = ("row_writer.py", "commit_file.py", "column_file.py", "row_files.py", "places.py")


def killed_at_line(n, run, work, how):
    """Return whether a fork that does some work was killed at the n-th line of the library that it came to."""
    child = os.fork()
    if child == 0:
        buffer = ArtifactBuffer(run, resume=True)
        assert len(buffer["a"])
        lines = itertools.count(1)

        def trace(frame, event, _):
            if event == "line" and next(lines) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            files = tuple(os.path.join(FOLDER, name) for name in (os.listdir(FOLDER) if work is reopen else WRITING))
            sys.settrace(lambda frame, *_: trace if frame.f_code.co_filename in files else None)
            work(buffer, how)
            sys.settrace(None)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def row(step, how):
    values = {"x": torch.full((3,), float(step)), "y": torch.tensor(step)}
    return values | ({"file": b"%d" % step * 9} if how == "files" else {})


def append(buffer, how):
    buffer.append("a", row(50, how), step=50)


def extend(buffer, how):
    steps = torch.arange(50, 53)
    values = {"x": steps.float()[:, None].repeat(1, 3), "y": steps, "meta": {"step": steps}}
    buffer.extend("a", TensorDict(values, [3]))


def truncate(buffer, how):
    buffer.truncate(20)


def reopen(buffer, how):
    buffer.close()
    return len(ArtifactBuffer(buffer.path, resume=True)["a"])


def steps_of(artifact, how):
    steps = artifact.steps.tolist()
    assert len(artifact) == len(steps)
    assert artifact.series("y").tolist() == steps
    assert torch.equal(artifact.series("x"), torch.tensor(steps)[:, None].float().expand(-1, 3))
    if how == "files":
        assert artifact.series("file") == [b"%d" % step * 9 for step in steps]
    return steps


BEFORE = {"plain": [0, 10, 20, 30, 40], "capacity": [20, 30, 40], "files": [0, 10, 20, 30, 40], "used": [0, 10, 20]}


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A run, its files full, or, if ``used``, with places that other rows had."""

    def begun(how):
        monkeypatch.setattr(row_writer, "_FIRST_ROWS", 5)
        monkeypatch.setattr(os, "fsync", lambda _: None)  # which a kill needs not
        path = tmp_path / "begun"
        with ArtifactBuffer(path, capacity=3 if how == "capacity" else None) as buffer:
            for step in range(0, 50, 10):
                buffer.append("a", row(step, how), step=step)
            if how == "used":
                buffer.truncate(20)
        assert ArtifactBuffer.open(path)["a"].steps.tolist() == BEFORE[how]
        return path

    return begun


CASES = [
    (how, work)
    for how, works in {
        "plain": (append, extend, truncate, reopen), "used": (append, extend),
        "capacity": (append, extend, truncate), "files": (append, truncate),
    }.items()
    for work in works
]  # fmt: skip


def check(found, how, work):
    before, new = BEFORE[how], {append: [50], extend: [50, 51, 52]}.get(work, [])
    if work is truncate:
        assert [step for step in before if step <= 20 or step in found] == found
    else:
        every = before + new
        end = every.index(found[-1]) + 1
        assert end >= len(before)
        assert found == every[end - len(found) : end]
        assert len(found) >= (3 if how == "capacity" else end)


@pytest.mark.parametrize(("how", "work"), CASES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_line_leaves_whole_rows_that_all_agree_on(begun, tmp_path, how, work, every):
    path = begun(how)
    for n in itertools.count(1, {truncate: 1, reopen: 3 * every}.get(work, every)):
        run = shutil.copytree(path, tmp_path / f"killed at {n}")
        held = ArtifactBuffer.open(run)["a"]
        assert steps_of(held, how) == BEFORE[how]
        killed = killed_at_line(n, run, work, how)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = ArtifactBuffer.open(run)
            found = steps_of(opened["a"], how)
            check(found, how, work)
            assert steps_of(opened["a"], how) == found  # at a second look
            assert steps_of(held, how) == found
            assert opened.verify() == []
            with ArtifactBuffer(run, resume=True) as buffer:
                buffer.append("a", row(60, how), step=60)
                after = [*found, 60] if how != "capacity" else [*found, 60][-3:]
                assert [steps_of(each, how) for each in (buffer["a"], opened["a"], held)] == [after] * 3
        shutil.rmtree(run)
        if not killed:
            break
    assert n > 20
