"""Several processes at one run: writers that are killed, readers that follow them, and no two writers."""

import copy
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import ClosedError

# Every number of a row is the row's step. Each writer is killed some rows and a random moment after its start; what is
# printed is how it ended, the last step it acknowledged, the steps that are there and those of torn rows.
KILLS = """
import json, os, random, signal, sys, time, warnings
import torch
from tensordict import TensorDict
from tdhook_train.buffer import ArtifactBuffer

warnings.simplefilter('error')
torch.set_num_threads(1)
random.seed(0)

def number(path, how, ack):
    buffer = ArtifactBuffer(path, resume=True, capacity=5 if how == 'capacity' else None)
    at = int(buffer['a'].steps.max()) + 1 if 'a' in buffer and len(buffer['a']) else 0
    while True:
        if how == 'extend':
            steps = torch.arange(at, at + 16)
            values = {'big': steps.float()[:, None].repeat(1, 2**15), 'n': {'small': steps[:, None].repeat(1, 3)}}
            buffer.extend('a', TensorDict(values | {'meta': {'step': steps}}, [16]))
            at += 16
        else:
            row = {'big': torch.full((2**19,), float(at)), ('n', 'small'): torch.full((3,), at)}
            buffer.append('a', row | ({'file': b'%d ' % at * 1000} if how == 'files' else {}), step=at)
            at += 1
        os.write(ack, (at - 1).to_bytes(8, 'little'))

def whole(row, how):
    step = row['meta', 'step']
    same = all(bool((row[key] == step).all()) for key in ('big', ('n', 'small')))
    return same and (how != 'files' or row['file'] == b'%d ' % step * 1000)

def look(path, how):
    run = ArtifactBuffer.open(path) if os.path.exists(path + '/manifest.json') else {}
    if 'a' not in run:
        return [], []
    rows = [(int(row['meta', 'step']), whole(row, how)) for row in (run['a'][i] for i in range(len(run['a'])))]
    return [step for step, _ in rows], [step for step, good in rows if not good] + run.verify()

for how in ('append', 'extend', 'capacity', 'files'):
    path = os.path.join(sys.argv[1], how)
    for kill in range(int(sys.argv[2])):
        read, ack = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                number(path, how, ack)
            finally:
                os._exit(1)
        os.close(ack)
        rows = random.randrange(5)
        acks = b''.join(os.read(read, 8) for _ in range(rows))
        time.sleep(random.uniform(0, .03 if rows == 0 else .004))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        acks += os.fdopen(read, 'rb').read()
        last = int.from_bytes(acks[-8:], 'little') if acks else -1
        print(json.dumps([how, status, last, *look(path, how)]), flush=True)
"""


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_exactly_the_acknowledged_rows_outlive_kills(start, path, kills):
    path.mkdir()
    ends = [json.loads(line) for line in start(KILLS, path, kills).communicate()[0].splitlines()]
    assert len(ends) == 4 * kills
    for how in ("append", "extend", "capacity", "files"):
        last, at_once = -1, 16 if how == "extend" else 1
        for _, status, acknowledged, found, torn in (end for end in ends if end[0] == how):
            assert status == -signal.SIGKILL
            assert torn == []
            last = max(last, acknowledged)
            end = found[-1] + 1 if found else 0
            assert found == list(range(end - len(found), end))  # in order, none missing in between
            assert last <= end - 1 <= last + at_once  # what was being written may be there, as far as it got
            if how == "capacity":
                assert min(end, 5) <= len(found) <= 6
            else:
                assert len(found) == end
            last = end - 1
        assert last > kills  # the writers did get somewhere


CRASH = """
import os, signal, sys, torch
from tdhook_train.buffer import ArtifactBuffer
buffer = ArtifactBuffer(sys.argv[1])
for step in range(3):
    row = {'attr': torch.full((4, 50), float(step)), ('net', 'code'): torch.full((3,), step)}
    buffer.append('probe', row, step=step)
child = os.fork()
if child == 0:
    signal.pause()
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_crash_the_next_writer_begins_at_once_though_a_worker_of_the_last_one_lives(start, path, fill):
    process = start(CRASH, path)
    worker = int(process.stdout.readline())
    try:
        assert process.wait() == -signal.SIGKILL
        assert (path / "writer.lock").read_text() == str(process.pid)
        with ArtifactBuffer(path, resume=True) as buffer:
            assert buffer.attempt == 1
            fill(buffer, [3])
            assert buffer["probe"].series("attr")[:, 0, 0].tolist() == [0, 1, 2, 3]
    finally:
        os.kill(worker, signal.SIGKILL)


# `frames` counts what was ever written; every number of a row but its step is that
FAST = """
import sys, torch
from tdhook_train.buffer import ArtifactBuffer
a, b = ArtifactBuffer(sys.argv[1]), ArtifactBuffer(sys.argv[2])
a.declare('kept', capacity=32)
n = step = 0
while True:
    row = {'big': torch.full((1000,), float(n)), 's': torch.tensor(float(n))}
    a.append('kept', row, step=n, frames=n)
    b.append('truncated', row, step=step, frames=n)
    if n < 5000:
        a.append('all', row, step=n, frames=n)
    n, step = n + 1, step + 1
    if step == 60:
        b.truncate(20)
        step = 21
    if n == 20:
        print(flush=True)
"""


def numbers(rows):
    return torch.cat([rows["meta", "frames"][:, None].float(), rows["s"][:, None], rows["big"]], 1)


WAYS = {
    "last": lambda artifact: numbers(artifact.last(5)),
    "between": lambda artifact: numbers(artifact.between()),
    "where": lambda artifact: numbers(artifact.where("s", lambda s: s >= 0)),
    "in order": lambda artifact: numbers(torch.stack(rows)) if (rows := list(artifact)) else torch.empty(0, 1),
    "series": lambda artifact: artifact.series("big"),
    "key": lambda artifact: artifact["big"],
    "slice": lambda artifact: numbers(artifact[-5:]),
    "sample": lambda artifact: numbers(artifact.sample(4)),
}


def taken(artifact, way):
    """Return rows as lists of numbers; by position, rows that are being dropped are an error that says so."""
    try:
        return WAYS[way](artifact)
    except IndexError as error:
        if way not in ("slice", "sample") or "dropped while" not in str(error):
            raise
        return torch.empty(0, 1)


@pytest.mark.slow
def test_a_reader_takes_5000_whole_rows_of_a_fast_writer_that_also_drops_and_truncates(start, path):
    process = start(FAST, path / "a", path / "b")
    process.stdout.readline()
    steady, n = ArtifactBuffer.open(path / "a")["all"], 0
    while n < 5000:
        assert process.poll() is None
        rows = numbers(steady[n:])
        assert torch.equal(rows, torch.arange(n, n + len(rows)).float()[:, None].expand_as(rows))  # each once
        n += len(rows)
    changing = ArtifactBuffer.open(path / "a")["kept"], ArtifactBuffer.open(path / "b")["truncated"]
    seen = dict.fromkeys(changing, 0)
    while min(seen.values()) < 5000:
        assert process.poll() is None
        for artifact in changing:
            for way in WAYS:
                rows = taken(artifact, way)
                assert (rows == rows[:, :1]).all(), way
                seen[artifact] += len(rows)
    commits = changing[0].storage.disk._commits
    changes = [commits.changes for _ in range(200_000)]
    assert changes == sorted(changes)  # it tells readers when to look again


@pytest.mark.parametrize("moment", ["places", "_check"])
@pytest.mark.parametrize("way", WAYS)
def test_a_row_that_is_replaced_while_it_is_read_is_left_out(path, monkeypatch, way, moment):
    with ArtifactBuffer(path, capacity=4) as buffer:
        for n in range(7):  # the last four lie in the places 3, 4, 0 and 1
            buffer.append("a", {"big": torch.full((5,), float(n)), "s": torch.tensor(float(n))}, step=n, frames=n)
        artifact = ArtifactBuffer.open(path)["a"]
        assert len(taken(artifact, way))
        written, read = buffer["a"].storage.disk, artifact.storage.disk
        place = int(written.places(torch.tensor(2)))
        real = getattr(read, moment)

        def replace(*args):
            written._commits.invalidate(place)
            written._columns[0].rows[place, :2] = 99
            return real(*args)

        monkeypatch.setattr(read, moment, replace)
        rows = taken(artifact, way)
        assert (rows == rows[:, :1]).all()


def test_a_reader_that_has_read_one_key_reads_whole_rows_after_the_files_grew(path, fill):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(3))
    artifact = ArtifactBuffer.open(path)["probe"]
    assert len(artifact.series("attr")) == 3
    with ArtifactBuffer(path, resume=True) as buffer:
        fill(buffer, range(3, 600))
    assert artifact.last(2)["attr"][:, 0, 0].tolist() == [598, 599]


def test_a_forked_copy_of_an_artifact_neither_writes_nor_drops(buffer, path, fill, forked):
    fill(buffer, range(3))
    artifact = buffer["probe"]
    rows, manifest = artifact[:2], (path / "manifest.json").read_text()
    for write in (lambda: artifact.extend(rows), lambda: artifact.add(rows[0]), artifact.empty):
        assert forked(write).startswith(f"ClosedError: {path}")
    forked(lambda: buffer.folder("new"))
    assert (path / "manifest.json").read_text() == manifest
    fill(buffer, [3])
    assert ArtifactBuffer.open(path)["probe"].series("attr")[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_deep_copy_of_a_writer_is_no_second_writer(path, fill, forked):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(3))
    with ArtifactBuffer(path, resume=True) as buffer:
        with pytest.raises((ClosedError, TypeError)):
            fill(copy.deepcopy(buffer), [99])
        assert forked(lambda: ArtifactBuffer(path, resume=True)).startswith("RunExistsError")
        fill(buffer, [3])
    assert ArtifactBuffer.open(path)["probe"].steps.tolist() == [0, 1, 2, 3]


def test_copying_the_folder_of_a_live_run_does_not_unlock_it(buffer, path, tmp_path, fill, forked):
    fill(buffer, range(3))
    copied = Path(shutil.copytree(path, tmp_path / "copy"))
    assert forked(lambda: ArtifactBuffer(path, resume=True)).startswith("RunExistsError")
    assert ArtifactBuffer.open(copied)["probe"].steps.tolist() == [0, 1, 2]


def test_runs_are_not_merged_into_one_that_another_process_writes(buffer, path, tmp_path, fill, forked):
    fill(buffer, range(3))
    with ArtifactBuffer(tmp_path / "other") as other:
        fill(other, [77])
    merge = lambda: ArtifactBuffer.merge([tmp_path / "other"], path, overwrite=True, progress=False)  # noqa: E731
    assert forked(merge).startswith(f"RunExistsError: {path} is being written by process {os.getpid()}")
    fill(buffer, [3])
    assert ArtifactBuffer.open(path)["probe"].steps.tolist() == [0, 1, 2, 3]


def read(path):
    artifact = ArtifactBuffer.open(path)["probe"]
    return artifact.steps.tolist(), artifact.series("attr").sum((1, 2)).tolist(), len(artifact.sample(4))


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_read_the_rows_of_their_parent(buffer, path, fill, how):
    fill(buffer, range(100))
    # as PyTorch's own workers do: of the parent's threads none lives on in a fork
    with multiprocessing.get_context(how).Pool(1, torch.set_num_threads, (1,)) as pool:
        expected = list(range(100)), [200.0 * step for step in range(100)], 4
        assert pool.map(read, [path, path]) == [expected, expected]
        fill(buffer, [100])
        assert pool.apply(read, [path])[0] == list(range(101))


def test_a_forked_worker_reads_with_what_it_was_given(buffer, path, fill, forked):
    fill(buffer, range(10))
    for artifact in (buffer["probe"], ArtifactBuffer.open(path)["probe"]):
        assert forked(lambda artifact=artifact: artifact.series("attr")[:, 0, 0].int().tolist()) == str([*range(10)])
        assert forked(lambda artifact=artifact: len(artifact.sample(4))) == "4"
