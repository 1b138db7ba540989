"""Full disks and folders without permission: clear errors, nothing is lost, and it goes on when there is room."""

import json
import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import DiskError


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture(params=["file size", "disk"])
def room(request, tmp_path):
    """Return a path, and how there is little and much room."""
    if request.param == "file size":
        return tmp_path / "run", lambda: limit(2_000_000), lambda: limit(-1)
    filler = request.getfixturevalue("small_disk") / "filler"
    return filler.with_name("run"), lambda: filler.write_bytes(bytes(2_000_000)), filler.unlink


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_full_disk_loses_no_row_and_writing_goes_on_once_there_is_room(room, forked, at_once):
    path, little, much = room

    def write(buffer, step):
        steps = torch.arange(step, step + at_once)
        rows = {"x": steps.float()[:, None].repeat(1, 25_000), "meta": {"step": steps}}
        if at_once == 1:
            return buffer.append("a", {"x": rows["x"][0]}, step=step)
        return buffer.extend("a", TensorDict(rows, [at_once]))

    def until_full():
        little()
        buffer, step = ArtifactBuffer(path), 0
        try:
            while step < 99:
                write(buffer, step)
                step += at_once
        except DiskError as error:
            said = str(error)
        seen = [artifact.series("x")[:, 7].tolist() for artifact in (buffer["a"], ArtifactBuffer.open(path)["a"])]
        much()
        for more in range(3):
            write(buffer, step + more * at_once)
        return json.dumps([said, step, *seen])

    said, full, *seen = json.loads(forked(until_full))
    assert f"of 'a'; what was written before is whole: '{path / 'a'}'" in said
    assert seen == [list(range(full))] * 2
    assert full > 8
    assert ArtifactBuffer.open(path)["a"].series("x").mean(1).tolist() == list(range(full + 3 * at_once))


def test_an_artifact_that_cannot_be_described_for_want_of_room_begins_later(path, fill, forked):
    def begin():
        buffer = ArtifactBuffer(path)
        fill(buffer, [0])
        buffer.declare("late", settings="long " * 20_000)
        limit(60_000)  # room for the rows, not for their settings
        try:
            buffer.append("late", {"x": 1}, step=0)
        except OSError as error:
            said = f"{type(error).__name__}: {error}"
        there = [list(buffer), list(ArtifactBuffer.open(path))]
        limit(-1)
        buffer.append("late", {"x": 2}, step=1)
        buffer.close()
        return json.dumps([said, *there])

    said, *there = json.loads(forked(begin))
    assert said.startswith("DiskError: ")
    assert str(path) in said
    assert there == [["probe"]] * 2
    assert ArtifactBuffer.open(path)["late"].series("x").tolist() == [2]
    assert not list(path.rglob(".*"))


def test_a_run_is_read_and_later_resumed_where_there_was_no_room_to_resume_it(path, fill, forked):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(3))

    def resume():
        limit(100)
        steps = ArtifactBuffer.open(path)["probe"].steps.tolist()
        try:
            ArtifactBuffer(path, resume=True)
        except OSError as error:
            return f"{steps} {type(error).__name__}: {error}"

    said = forked(resume)
    assert said.startswith("[0, 1, 2] DiskError: ")
    assert str(path) in said
    with ArtifactBuffer(path, resume=True) as buffer:
        fill(buffer, [3])
        assert buffer["probe"].steps.tolist() == [0, 1, 2, 3]


def test_an_event_that_finds_no_room_is_an_error_and_spoils_no_other(path, forked):
    def note():
        buffer, refused = ArtifactBuffer(path), []
        limit(450)
        for i in range(9):
            try:
                buffer.note("mark", i=i, text="x" * 20)
            except OSError:
                refused.append(i)
        limit(-1)
        buffer.note("mark", i=9)
        buffer.note("mark", i=10)
        return refused

    refused = json.loads(forked(note))
    assert 0 < len(refused) < 9
    assert [event["i"] for event in ArtifactBuffer.open(path).events()] == [i for i in range(11) if i not in refused]


def test_a_copy_with_holes_on_a_full_disk_is_an_error_and_kills_nobody(path, small_disk, forked):
    def row(step):
        return {"x": torch.full((25_000,), float(step))}

    with ArtifactBuffer(path) as buffer:
        for step in range(5):  # the files have room for eight, which a copy may leave out
            buffer.append("a", row(step), step=step)
    subprocess.run(["cp", "-r", "--sparse=always", path, small_disk], check=True)
    copied = small_disk / path.name
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))

    def resume():
        buffer = ArtifactBuffer(copied, resume=True)
        for step in range(5, 8):
            buffer.append("a", row(step), step=step)

    assert forked(resume).startswith("DiskError: ")
    (small_disk / "filler").unlink()
    assert ArtifactBuffer.open(copied)["a"].series("x").mean(1).tolist() == list(range(5))


def test_a_reader_survives_a_writer_that_runs_out_of_room(path, forked):
    def write():
        reader, real = None, os.posix_fallocate

        def grows_a_bit(fd, start, size):  # as ext4 does before it gives up
            if reader is None or "commits" not in os.readlink(f"/proc/self/fd/{fd}"):
                return real(fd, start, size)
            real(fd, start, size // 2)
            reader.refresh()
            raise OSError(28, "No space left on device")

        os.posix_fallocate = grows_a_bit
        with ArtifactBuffer(path) as buffer:
            for step in range(256):
                buffer.append("a", {"x": torch.zeros(100)}, step=step)
            reader = ArtifactBuffer.open(path)["a"]
            try:
                for step in range(256, 9999):
                    buffer.append("a", {"x": torch.zeros(100)}, step=step)
            except DiskError:
                buffer.truncate(99)
                return len(reader.steps)

    assert forked(write) == "100"


CLOSED = [
    (".", 0o555, "begin"), (".", 0o555, "resume"), ("probe/commits", 0o444, "resume"),
    ("probe/000.attr.column", 0o444, "resume"), (".", 0, "open"), ("manifest.json", 0, "open"), ("probe", 0, "open"),
    ("probe/commits", 0, "open"), ("probe/000.attr.column", 0, "open"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mode", "what"), CLOSED)
def test_a_path_without_permission_is_said(path, fill, forked, name, mode, what):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(3))
    with tempfile.TemporaryDirectory() as folder:  # the folders of pytest are closed to other users
        run = Path(shutil.copytree(path, Path(folder) / "run"))
        Path(folder).chmod(0o755)
        if os.getuid() == 0:  # root may do anything: somebody else tries
            for file in (run, *run.rglob("*")):
                os.chown(file, 65534, 65534)
        run.joinpath(name).chmod(mode)

        def tries():
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            if what == "begin":
                return ArtifactBuffer(run / "new")
            if what == "open":
                return ArtifactBuffer.open(run)["probe"].series("attr")
            with ArtifactBuffer(run, resume=True) as buffer:
                return buffer["probe"]

        said = forked(tries)
        assert said.startswith("PermissionError: [Errno 13] Permission denied: ")
        assert f"'{run / name}" in said
        run.joinpath(name).chmod(0o755)
        assert ArtifactBuffer.open(run)["probe"].steps.tolist() == [0, 1, 2]
