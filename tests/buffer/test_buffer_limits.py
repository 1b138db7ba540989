"""Limits of a run and of an artifact, and what happens when they change."""

import torch
from tensordict import TensorDict

from tdhook_train.buffer import ArtifactBuffer


def stream(buffer, steps):
    rows = TensorDict({"x": torch.zeros(len(steps)), "meta": {"step": torch.tensor(list(steps))}}, [len(steps)])
    buffer.extend("a", rows)


def bytes_on_disk(folder):
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".json")


def test_a_smaller_max_bytes_drops_rows_at_once_and_frees_no_disk_that_others_may_have_mapped(path):
    with ArtifactBuffer(path, max_bytes=100_000) as buffer:
        stream(buffer, range(900))
        before = bytes_on_disk(path / "a")
        buffer.declare("a", max_bytes=30_000)
        artifact = buffer["a"]
        assert len(artifact) * artifact.storage.disk.row_bytes <= 30_000
        assert artifact.steps.tolist() == list(range(900 - len(artifact), 900))
        stream(buffer, range(900, 1800))
        assert bytes_on_disk(path / "a") == before


def test_limits_of_the_run_hold_where_an_artifact_has_none_of_its_own(path):
    def add(buffer, name, steps):
        for step in steps:
            buffer.append(name, {"x": step}, step=step)

    with ArtifactBuffer(path, capacity=3) as buffer:
        buffer.declare("log", keep="log-spaced")
        buffer.declare("own", capacity=5)
        for name in ("log", "own", "run"):
            add(buffer, name, range(8))
        assert buffer["log"].steps.tolist() == [0, 1, 7]
        assert buffer["own"].steps.tolist() == [3, 4, 5, 6, 7]
        assert buffer["run"].steps.tolist() == [5, 6, 7]
    with ArtifactBuffer.open(path, "a") as buffer:
        add(buffer, "late", range(8))
        assert buffer["late"].steps.tolist() == [5, 6, 7]
    with ArtifactBuffer(path, resume=True, capacity=2) as buffer:
        assert [len(buffer[name]) for name in ("log", "own", "run", "late")] == [3, 5, 2, 2]


def test_limits_can_be_changed_without_saying_everything_again(path):
    with ArtifactBuffer(path) as buffer:
        buffer.declare("a", dims={"x": "unit"}, coords={"unit": ["l", "r"]}, settings={"k": 1})
        for step in range(6):
            buffer.append("a", {"x": torch.zeros(2)}, step=step)
        buffer.declare("a", capacity=2)
        assert buffer["a"].steps.tolist() == [4, 5]
        assert buffer["a"].coords["unit"] == ["l", "r"]
