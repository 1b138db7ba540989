"""Every row that was acknowledged outlives its writer; a reader never sees part of one."""

import time

import pytest
import torch

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import DamagedWarning

KILLS = """
import os, random, signal, sys, time
import torch
from tdhook_train.buffer import ArtifactBuffer

def write(path, ack):
    buffer = ArtifactBuffer(path, resume=True)
    at = len(buffer['a']) if 'a' in buffer else 0
    while True:
        value = float(at)
        row = {'big': torch.full((20_000,), value), ('n', 'small'): torch.full((3,), value), 's': torch.tensor(value)}
        buffer.append('a', row, step=at)
        os.write(ack, at.to_bytes(8, 'little'))
        at += 1

torch.set_num_threads(1)
random.seed(0)
for kill in range(8):
    read, ack = os.pipe()
    child = os.fork()
    if child == 0:
        write(sys.argv[1], ack)
    os.close(ack)
    acks = os.read(read, 8) if kill % 2 else b''  # every second is killed once it writes, however busy the machine
    time.sleep(random.uniform(.03, .12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acks += os.fdopen(read, 'rb').read()
    print(int.from_bytes(acks[-8:], 'little') if acks else -1, flush=True)
    artifact = ArtifactBuffer.open(sys.argv[1])['a'] if acks else []
    print(len(artifact), flush=True)
"""


def check_rows(rows, steps):
    for key in ("big", ("n", "small"), "s"):
        value = rows[key].reshape(len(steps), -1)
        assert torch.equal(value, steps.to(value)[:, None].expand_as(value))


def test_acknowledged_rows_outlive_kill_9(start, path):
    out = [int(line) for line in start(KILLS, path).communicate()[0].split()]
    acknowledged, found = out[::2], out[1::2]
    assert len(found) == 8
    assert acknowledged[-1] > 8  # the writers did get somewhere
    for last, length in zip(acknowledged, found, strict=True):
        assert length - 2 <= last <= length - 1  # at most one row was committed and not yet acknowledged
    artifact = ArtifactBuffer.open(path)["a"]
    assert artifact.steps.tolist() == list(range(found[-1]))
    check_rows(artifact[:], artifact.steps)


LIVE = """
import sys, torch
from tdhook_train.buffer import ArtifactBuffer
with ArtifactBuffer(sys.argv[1]) as buffer:
    for i in range(3000):
        v = float(i)
        row = {'big': torch.full((3000,), v), ('n', 'small'): torch.full((3,), v), 's': torch.tensor(v)}
        buffer.append('a', row, step=i)
        if i == 1500:
            buffer.append('late', {'x': 1.0}, step=i)
    buffer.note('done')
"""


def test_a_reader_sees_whole_rows_and_new_artifacts_while_another_process_writes(start, path):
    process = start(LIVE, path)
    deadline = time.monotonic() + 30
    while not (path / "manifest.json").exists():
        assert time.monotonic() < deadline
    reader, lengths, seen_late = ArtifactBuffer.open(path), [0], False
    while not reader.events("done"):
        assert time.monotonic() < deadline
        if "a" in reader:
            rows = reader["a"].last(5)
            if len(rows):
                check_rows(rows, rows["meta", "step"])
                assert int(rows["meta", "step"][-1]) >= lengths[-1] - 1  # what was seen once stays
            lengths.append(len(reader["a"]))
            seen_late |= "late" in reader and lengths[-1] < 3000
    assert process.wait() == 0
    assert len(set(lengths)) > 5  # it did read while the other wrote
    assert seen_late
    artifact = reader["a"]
    assert len(artifact) == 3000
    check_rows(artifact[:], torch.arange(3000))


def test_a_row_whose_commit_is_gone_is_named_and_the_others_are_there(path, fill):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(6))
        buffer["probe"].storage.disk._commits.rows[3, 0] = 0
    with pytest.warns(DamagedWarning, match=r"probe: row 3 is damaged and left out"):
        assert ArtifactBuffer.open(path)["probe"].steps.tolist() == [0, 1, 2, 4, 5]
    with ArtifactBuffer(path, resume=True) as buffer:
        with pytest.warns(DamagedWarning, match="row 3"):
            fill(buffer, [7])
        assert buffer["probe"].steps.tolist() == [0, 1, 2, 4, 5, 7]
    with pytest.warns(DamagedWarning, match="row 3"):
        assert ArtifactBuffer.open(path)["probe"].series("attr")[:, 0, 0].tolist() == [0, 1, 2, 4, 5, 7]


def test_an_append_stopped_half_way_leaves_no_row(path, fill, monkeypatch):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(3))
        last = buffer["probe"].storage.disk._columns[-1]

        def stop(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(last, "checksum", stop)
            with pytest.raises(KeyboardInterrupt):
                fill(buffer, [99])
        assert ArtifactBuffer.open(path)["probe"].steps.tolist() == [0, 1, 2]
        fill(buffer, [3])
        assert buffer["probe"].steps.tolist() == [0, 1, 2, 3]
    assert torch.equal(ArtifactBuffer.open(path)["probe"].series("attr")[:, 3, 7], torch.arange(4.0))


def test_a_writer_killed_before_its_first_row_leaves_a_folder_that_can_be_used(path, fill, monkeypatch):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, [1])
    (path / ".manifest.json.12.tmp").write_text("{")
    (path / "other").mkdir()
    (path / "other" / "0.000.attr.column").write_text("left")
    with ArtifactBuffer(path, resume=True) as buffer:
        assert list(buffer) == ["probe"]
        fill(buffer, [2], "other")
        assert buffer["other"].at(2)["attr"][0, 0] == 2
    assert not list(path.glob(".manifest*"))


def test_a_reader_follows_a_writer_that_goes_back(path, fill):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(10))
        artifact = ArtifactBuffer.open(path)["probe"]
        assert len(artifact) == 10
        buffer.truncate(3)
        assert artifact.steps.tolist() == [0, 1, 2, 3]
        fill(buffer, range(4, 400))
        assert len(artifact) == 400
    assert artifact.series("attr")[:, 0, 0].tolist() == list(range(400))


def test_a_reader_sees_the_new_run_after_overwriting(path, fill):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(10))
    reader = ArtifactBuffer.open(path)
    held = reader["probe"]
    with ArtifactBuffer(path, overwrite=True) as buffer:
        fill(buffer, [77])
    assert reader["probe"].steps.tolist() == [77]
    assert held.series("attr")[:, 0, 0].tolist() == list(range(10))  # what is mapped stays


def test_a_writer_may_grow_its_files_while_a_reader_maps_them(path, monkeypatch):
    with ArtifactBuffer(path) as buffer:

        def grow():
            room = buffer["a"].storage.disk.capacity
            while buffer["a"].storage.disk.capacity == room:
                step = len(buffer["a"])
                buffer.append("a", {"x": torch.full((3,), float(step))}, step=step)

        buffer.append("a", {"x": torch.zeros(3)}, step=0)
        reader = ArtifactBuffer.open(path)["a"]
        commits = reader.storage.disk._commits
        map_commits = commits.map

        def map_then_grow(room):
            map_commits(room)
            grow()

        grow()
        monkeypatch.setattr(commits, "map", map_then_grow)
        seen = reader.steps  # remaps, and the files grow once more in between
        monkeypatch.undo()
        assert torch.equal(seen, torch.arange(len(seen)))
        assert torch.equal(reader.steps, torch.arange(len(buffer["a"])))
