"""Rows reach the disk when asked, and some seconds after they were written."""

import os
import threading

import pytest

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import DiskError


@pytest.fixture
def synced(monkeypatch):
    """Note the files that are synced, in order."""
    names, real = [], os.fsync

    def fsync(fd):
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


@pytest.fixture
def flushed(monkeypatch):
    """An event for each end of a flush."""
    done, real = threading.Event(), ArtifactBuffer.flush

    def flush(self):
        try:
            real(self)
        finally:
            done.set()

    monkeypatch.setattr(ArtifactBuffer, "flush", flush)
    return done


def test_values_reach_the_disk_before_the_commits_that_vouch_for_them(path, fill, synced):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(3))
        buffer.append("figure", {"png": b"123"}, step=0)
        buffer.note("mark")
        synced.clear()
        buffer.flush()
        columns, files, rest = ["000.attr.column", "001.net.code.column", "commits", "probe"], synced[4:-2], synced[-2:]
        assert synced[:4] == columns
        assert [name.split(".", 1)[-1] for name in files] == ["0.png", "commits", "figure"]
        assert rest == ["events.jsonl", "run"]


def test_a_row_waits_no_longer_than_asked(path, fill, synced, flushed):
    with ArtifactBuffer(path, flush_every=0.01) as buffer:
        fill(buffer, [0])
        for step in (1, 2):  # each row that comes after a flush has one of its own
            flushed.clear()
            fill(buffer, [step])
            assert flushed.wait(30)
        assert synced.count("commits") >= 2


def test_without_a_time_nothing_is_flushed_before_it_is_asked(path, fill, synced):
    before = threading.active_count()
    buffer = ArtifactBuffer(path, flush_every=0)
    fill(buffer, [0])
    assert threading.active_count() == before
    assert "commits" not in synced
    buffer.close()
    assert "commits" in synced


def test_a_flush_that_fails_is_said_by_the_next_append_which_is_kept(path, fill, flushed, monkeypatch):
    def fails(fd):
        raise OSError(5, "Input/output error")

    buffer = ArtifactBuffer(path, flush_every=0.01)
    fill(buffer, [0])
    flushed.wait(30)
    flushed.clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        fill(buffer, [1])
        assert flushed.wait(30)
        buffer._flusher.wait()
    with pytest.raises(DiskError, match=r"Input/output error: the last rows may not outlast a power cut"):
        fill(buffer, [2])
    fill(buffer, [3])
    buffer.close()
    assert ArtifactBuffer.open(path)["probe"].steps.tolist() == [0, 1, 2, 3]


def test_no_thread_is_left_when_it_is_closed(path, fill):
    before = set(threading.enumerate())
    with ArtifactBuffer(path, flush_every=60) as buffer:
        fill(buffer, [0])
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) == before
