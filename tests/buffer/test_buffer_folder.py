"""Runs are never overwritten unasked, files of others never; readers and later writers find all."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.buffer.manifest import Manifest
from tdhook_train.errors import (
    ClosedError,
    DamagedError,
    DamagedWarning,
    KeyMissingError,
    RunExistsError,
    SchemaError,
    SettingsError,
)


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def run(path, fill):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(5))
    return path


def test_a_run_is_not_overwritten_unasked(run):
    before = files(run)
    with pytest.raises(RunExistsError, match=r"resume=True .* overwrite=True"):
        ArtifactBuffer(run)
    assert files(run) == before


def test_both_options_are_one_too_many(run):
    with pytest.raises(SettingsError, match="choose one"):
        ArtifactBuffer(run, resume=True, overwrite=True)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_other_peoples_files_are_left_alone(tmp_path, options):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunExistsError, match=r"thesis\.tex"):
        ArtifactBuffer(tmp_path, **options)
    with pytest.raises(RunExistsError, match="is a file"):
        ArtifactBuffer(tmp_path / "thesis.tex", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_new_folder_begins_a_run_with_any_option(tmp_path, fill, options):
    (tmp_path / "empty").mkdir()
    for folder in ("a/b/new", "empty"):
        with ArtifactBuffer(tmp_path / folder, **options) as buffer:
            fill(buffer, range(2))
            assert buffer.attempt == 0
        assert len(ArtifactBuffer.open(tmp_path / folder)["probe"]) == 2


def test_resuming_goes_on_and_counts_attempts(run, fill):
    for attempt in (1, 2):
        with ArtifactBuffer(run, resume=True) as buffer:
            assert buffer.attempt == attempt
            fill(buffer, [10 * attempt])
    with ArtifactBuffer.open(run, "a") as buffer:
        fill(buffer, [30])
    artifact = ArtifactBuffer.open(run)["probe"]
    assert artifact.steps.tolist() == [0, 1, 2, 3, 4, 10, 20, 30]
    assert artifact.series(("meta", "attempt")).tolist() == [0, 0, 0, 0, 0, 1, 2, 3]
    assert torch.equal(artifact.series("attr")[:, 0, 0], artifact.steps.float())


def test_overwriting_deletes_the_run_and_no_more(run, fill):
    (run / "mine.txt").write_text("keep")
    (run / "probe" / "mine.txt").write_text("keep")
    with ArtifactBuffer(run, resume=True) as buffer:
        (buffer.folder("probe_sets") / "a.pt").write_text("x")
        buffer.note("mark")
    with ArtifactBuffer(run, overwrite=True) as buffer:
        assert list(buffer) == []
        assert buffer.attempt == 0
        assert buffer.events() == []
        fill(buffer, [7], name="other")
    assert {name for name in files(run) if "column" not in name and "commits" not in name} == {
        "mine.txt", "probe/mine.txt", "manifest.json", "writer.lock", "other/schema.json"
    }  # fmt: skip
    assert list(ArtifactBuffer.open(run)) == ["other"]
    assert not any((run / "probe").glob("*.column"))


def test_what_is_not_there_is_named_with_the_runs_near_by(run, tmp_path):
    for wrong in ("rnu", "run/probe"):
        with pytest.raises(KeyMissingError, match=rf"{wrong} (does not exist|holds no run).*{run}"):
            ArtifactBuffer.open(tmp_path / wrong)
    with pytest.raises(KeyMissingError, match=rf"holds no run; there are runs in {run}"):
        ArtifactBuffer.open(tmp_path)
    with pytest.raises(KeyMissingError, match="no run near by"):
        ArtifactBuffer.open(tmp_path / "far" / "away")
    with pytest.raises(KeyMissingError, match="no artifact 'prob'; did you mean 'probe'"):
        ArtifactBuffer.open(run)["prob"]
    with pytest.raises(SettingsError, match="mode='w'"):
        ArtifactBuffer.open(run, "w")


def test_artifacts_are_listed_as_declared(path):
    with ArtifactBuffer(path) as buffer:
        for name in ("zeta", "alpha", "mid"):
            buffer.declare(name, dims={})
        assert list(buffer) == []
        for name in ("mid", "late", "zeta", "alpha"):
            buffer.append(name, {"x": 1}, step=0)
        expected = ["zeta", "alpha", "mid", "late"]
        assert list(buffer) == buffer.keys() == expected
        assert len(buffer) == 4
        assert "mid" in buffer
        assert "nope" not in buffer
    assert list(ArtifactBuffer.open(path)) == expected


def test_the_manifest_can_be_read_by_people_and_programs(run):
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert set(manifest["versions"]) == {"python", "torch", "tensordict", "torchrl", "tdhook_train"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["artifacts"]["probe"]["columns"][0]["key"] == ["attr"]
    assert manifest["created"].startswith("20")


@pytest.mark.parametrize("text", ["", "{}", "[]", "{'a'}"])
def test_beside_a_broken_manifest_rows_are_read_but_not_written(run, text):
    (run / "manifest.json").write_text(text)
    with pytest.warns(DamagedWarning, match=r"manifest\.json is damaged"):
        assert ArtifactBuffer.open(run)["probe"].steps.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DamagedError, match=r"manifest\.json is no manifest of a run"):
        ArtifactBuffer(run, resume=True)
    assert (run / "manifest.json").read_text() == text


def test_a_folder_of_another_format_is_refused(run):
    (run / "manifest.json").write_text('{"format": 99}')
    for attempt in (lambda: ArtifactBuffer.open(run), lambda: ArtifactBuffer(run, resume=True)):
        with pytest.raises(SchemaError, match=r"manifest\.json has format 99, expected 2"):
            attempt()


def test_without_its_manifest_a_run_is_read_and_goes_on(run, fill):
    (run / "manifest.json").unlink()
    with pytest.raises(RunExistsError, match="resume=True"):
        ArtifactBuffer(run)
    with pytest.warns(DamagedWarning, match=r"manifest\.json is missing.*\(probe\)"):
        reader = ArtifactBuffer.open(run)
    assert reader["probe"].steps.tolist() == [0, 1, 2, 3, 4]
    assert not (run / "manifest.json").exists()
    with pytest.warns(DamagedWarning, match="missing"), ArtifactBuffer(run, resume=True) as buffer:
        fill(buffer, [5])
    reader = ArtifactBuffer.open(run)
    assert reader["probe"].series(("meta", "attempt")).tolist() == [0, 0, 0, 0, 0, 1]


def test_a_manifest_that_cannot_be_replaced_stays_and_leaves_no_other_file(run, monkeypatch):
    before = files(run)
    buffer = ArtifactBuffer.open(run)

    def fails(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        Manifest.read(run).write(run)
    assert files(run) == before
    assert len(buffer["probe"]) == 5


def test_no_file_process_or_optional_package_is_left_behind(start, tmp_path):
    code = """
import os, sys, threading, torch
from tdhook_train.buffer import ArtifactBuffer
before = set(os.listdir('/dev/shm')), set(os.listdir('/tmp'))
with ArtifactBuffer(sys.argv[1]) as b:
    for i in range(600): b.append('a', {'x': torch.ones(100)}, step=i)
    b['a'].sample(5); b.truncate(500); b.append('a', {'x': torch.ones(100)}, step=3); b.truncate(400)
children = open(f'/proc/self/task/{os.getpid()}/children').read()
print(repr(children), threading.active_count(), (set(os.listdir('/dev/shm')), set(os.listdir('/tmp'))) == before)
print([module for module in ('pandas', 'xarray', 'plotly') if module in sys.modules])
"""
    assert start(code, tmp_path / "run").communicate()[0].splitlines()[:2] == ["'' 1 True", "[]"]
    assert set(os.listdir(tmp_path / "run")) == {"a", "manifest.json", "writer.lock"}


def test_files_keep_no_descriptor_open(path):
    before = len(os.listdir("/proc/self/fd"))
    with ArtifactBuffer(path) as buffer:
        buffer.append("a", {f"k{i}": torch.ones(3) for i in range(40)}, step=0)
        assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_run_that_nobody_may_write_can_be_read(run, forked):
    with tempfile.TemporaryDirectory() as folder:  # the folders of pytest are closed to other users
        copy = Path(shutil.copytree(run, Path(folder) / "run"))
        Path(folder).chmod(0o755)
        for file in [copy, *copy.rglob("*")]:
            file.chmod(0o555)

        def read():
            if os.getuid() == 0:  # root may write anything
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            assert not os.access(copy / "manifest.json", os.W_OK)
            buffer = ArtifactBuffer.open(copy)
            return buffer["probe"].steps.tolist(), len(buffer["probe"].sample(3)), buffer.events()

        assert forked(read) == "([0, 1, 2, 3, 4], 3, [])"
        copy.chmod(0o755)
        (copy / "probe").chmod(0o755)


def test_truncating_drops_later_steps_from_all_artifacts(path, fill):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(0, 100, 10), "a")
        fill(buffer, range(0, 100, 7), "b")
        buffer.truncate(40)
        assert buffer["a"].steps.tolist() == [0, 10, 20, 30, 40]
        assert buffer["b"].steps.tolist() == [0, 7, 14, 21, 28, 35]
        fill(buffer, [41], "a")
    reader = ArtifactBuffer.open(path)
    assert reader["a"].series("attr")[:, 0, 0].tolist() == [0, 10, 20, 30, 40, 41]
    assert len(reader["b"]) == 6


def test_truncating_unordered_rows_keeps_the_others(path, fill):
    steps = [5, 80, 3, 90, 40, 7]
    with ArtifactBuffer(path) as buffer:
        fill(buffer, steps, "a")
        watcher = ArtifactBuffer.open(path)
        held = watcher["a"]
        assert len(held) == 6
        artifact = buffer["a"]
        buffer.truncate(40)
        fill(buffer, [60], "a")
        assert artifact.steps.tolist() == held.steps.tolist() == watcher["a"].steps.tolist() == [3, 5, 7, 40, 60]
        assert held["meta", "step"].tolist() == [5, 3, 40, 7, 60]
    with ArtifactBuffer(path, resume=True) as buffer:
        assert buffer["a"].series("attr")[:, 0, 0].tolist() == [3, 5, 7, 40, 60]


def test_events_are_lines_and_survive_a_torn_one(path):
    with ArtifactBuffer(path) as buffer:
        buffer.note("mark", text="lr drop", step=3, value=torch.tensor(2.0), where=Path("x"))
        buffer.note("skip", time=5.0)
        assert [event["kind"] for event in buffer.events()] == ["mark", "skip"]
        assert buffer.events("mark")[0] | {"time": 0} == {
            "kind": "mark", "time": 0, "text": "lr drop", "step": 3, "value": 2.0, "where": "x"
        }  # fmt: skip
        assert buffer.events("skip")[0]["time"] == 5.0
    with (path / "events.jsonl").open("a") as file:
        file.write('{"kind": "torn", "te')
    assert len(ArtifactBuffer.open(path).events()) == 2
    with ArtifactBuffer(path, resume=True) as buffer:
        buffer.note("after")
        assert [event["kind"] for event in buffer.events()] == ["mark", "skip", "after"]


def test_folders_are_no_artifacts(buffer, path, fill):
    assert buffer.folder("probe_sets") == path / "probe_sets"
    assert (path / "probe_sets").is_dir()
    fill(buffer, [0])
    assert list(buffer) == ["probe"]
    assert ArtifactBuffer.open(path).folder("probe_sets") == path / "probe_sets"
    with pytest.raises(SettingsError, match="folder for other files"):
        fill(buffer, [0], "probe_sets")
    with pytest.raises(SettingsError, match="folder of an artifact"):
        buffer.folder("probe")


def test_a_second_writer_is_refused_in_another_process_and_takes_over_in_this_one(path, fill, forked):
    buffer = ArtifactBuffer(path)
    fill(buffer, range(3))
    refused = f"RunExistsError: {path} is being written by process {os.getpid()}"
    open_again = lambda: ArtifactBuffer(path, resume=True)  # noqa: E731
    assert forked(open_again).startswith(refused)
    assert forked(lambda: fill(buffer, [3])).startswith(f"ClosedError: {path} is written by process {os.getpid()}")
    later = open_again()
    with pytest.raises(ClosedError):
        fill(buffer, [3])
    fill(later, [3])
    assert forked(open_again).startswith(refused)
    later.close()
    assert ArtifactBuffer.open(path)["probe"].steps.tolist() == [0, 1, 2, 3]
    assert forked(lambda: open_again().attempt) == "2"


def test_the_path_holds_when_the_working_directory_changes(tmp_path, fill, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ArtifactBuffer("here") as buffer:
        monkeypatch.chdir("/")
        fill(buffer, [1])
    assert buffer.path == tmp_path / "here"
    assert len(ArtifactBuffer.open(tmp_path / "here")["probe"]) == 1
