"""Values whose shape differs from row to row lie in files, which come and go with their rows."""

import contextlib
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.buffer.commit_file import CommitFile
from tdhook_train.buffer.row_files import RowFiles
from tdhook_train.buffer.row_writer import RowWriter
from tdhook_train.errors import DamagedError, DamagedWarning, DiskError, KeyMissingError, SchemaError, TdhookTrainError

FIT = ("fit", "dictionary")
WRITTEN = [3, 1, 2, 0]  # steps, in the order of writing


def png(step):
    return random.Random(step).randbytes(50 * step)


def values(step):
    fit = {"atoms": torch.full((step + 1, 2), float(step)), "of": {"codes": torch.arange(step, dtype=torch.int16)}}
    table = torch.full((2,) * step, step, dtype=torch.bfloat16)
    return {"x": float(step), "fit": {"dictionary": fit}, "t": table, "png": png(step)}


def fill(buffer, steps):
    if "a" not in buffer:
        buffer.declare("a", files=[FIT, "t"])
    for step in steps:
        buffer.append("a", values(step), step=step)


def same(found, wanted):
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


def check(rows, steps):
    rows = list(rows)
    assert [int(row["meta", "step"]) for row in rows] == [int(row["x"]) for row in rows] == list(steps)
    for row, step in zip(rows, steps, strict=True):
        wanted = TensorDict(values(step))
        assert set(row[FIT].keys(True, True)) == {"atoms", ("of", "codes")}
        assert all(same(row[key], wanted[key]) for key in ((*FIT, "atoms"), (*FIT, "of", "codes"), "t"))
        assert row["png"] == png(step)


def stored(path):
    pictures = [file.read_bytes() for file in (path / "a").glob("*.png")]
    assert len(list((path / "a").glob("*.pt"))) == 2 * len(pictures)
    return sorted(len(picture) // 50 for picture in pictures)  # the steps of the rows that have files


@pytest.fixture(params=["writer", "resumed", "reader"])
def artifact(path, request):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, WRITTEN)
        if request.param == "writer":
            yield buffer["a"]
    if request.param == "resumed":
        with ArtifactBuffer(path, resume=True) as buffer:
            yield buffer["a"]
    if request.param == "reader":
        yield ArtifactBuffer.open(path)["a"]


def test_questions_give_the_row_with_its_files(artifact):
    for step in WRITTEN:
        check([artifact.at(step)], [step])
    check(artifact.between(1, 2).unbind(0), [1, 2])
    check(artifact.first(3).unbind(0), [0, 1, 2])
    check(artifact.where("x", lambda x: x > 1).unbind(0), [2, 3])
    check(artifact.where("png", lambda files: torch.tensor([len(file) == 50 for file in files])).unbind(0), [1])
    check(artifact, [0, 1, 2, 3])
    check(artifact.replay(), [0, 1, 2, 3])
    assert len(artifact.between(10, 20)) == 0
    with pytest.raises(KeyMissingError, match="no row of step 9"):
        artifact.at(9)


def test_positions_give_the_row_with_its_files(artifact):
    for index in (
        slice(None),
        slice(1, 3),
        [2, 0],
        [-1],
        torch.tensor([3, 3]),
        torch.tensor([True, False, True, True]),
    ):
        check(artifact[index].unbind(0), torch.tensor(WRITTEN)[index].tolist())
    check([artifact[0], artifact[-1]], [3, 0])


def test_samples_hold_the_files_of_their_row(artifact):
    rows = artifact.sample(50)
    check(rows.unbind(0), rows["x"].int().tolist())
    assert len(rows["index"].unique()) == 4


def test_a_key_alone_is_a_list_over_the_rows(artifact):
    assert artifact.series("png") == [png(step) for step in range(4)]
    assert list(artifact["png"]) == [png(step) for step in WRITTEN]
    assert [fit["atoms"].shape[0] for fit in artifact.series(FIT)] == [1, 2, 3, 4]
    only = artifact.at(2, keys=["png", ("meta", "step")])
    assert (only["png"], set(only.keys())) == (png(2), {"png", "meta"})
    assert artifact.dims("t") == ()


def test_tables_leave_files_out(artifact, tmp_path):
    assert "png" not in artifact.to_pandas()
    assert set(artifact.to_xarray()) == {"x"}
    assert artifact.to_parquet(tmp_path / "a.parquet").exists()
    with pytest.raises(SchemaError, match="'png' of 'a' is kept in files"):
        artifact.to_pandas("png")


@pytest.mark.parametrize("key", ["a/b", "..", "x.pt", "k" * 300, "名" * 100], ids=["/", "..", ".pt", "long", "wide"])
def test_any_key_can_be_kept_in_a_file(path, key):
    with ArtifactBuffer(path) as buffer:
        buffer.append("a", {key: b"one", "other": b"two"}, step=0)
        buffer.append("a", {key: torch.ones(2), "other": b""}, step=1)
    found = ArtifactBuffer.open(path)["a"]
    assert (found.at(0)[key], found.at(0)["other"], found.at(1)["other"]) == (b"one", b"two", b"")
    assert torch.equal(found.at(1)[key], torch.ones(2))


def test_files_go_with_their_rows(path):
    with ArtifactBuffer(path, capacity=3, keep="log-spaced") as buffer:
        reader = None
        for step in range(20):
            fill(buffer, [step])
            reader = reader or ArtifactBuffer.open(path)["a"]
            check(reader, buffer["a"].steps.tolist())
            assert stored(path) == buffer["a"].steps.tolist()
        fill(buffer, [5])
        buffer.truncate(5)
        assert stored(path) == buffer["a"].steps.tolist() == [0, 5]
        check(reader, [0, 5])
    with ArtifactBuffer(path, overwrite=True):
        assert not (path / "a").exists()


def test_rows_that_go_while_they_are_read_are_left_out(path, monkeypatch):
    with ArtifactBuffer(path, capacity=3) as buffer:
        fill(buffer, [0, 1, 2])
        reader, read = ArtifactBuffer.open(path)["a"], RowFiles.read
        rows = reader.in_order()
        check([next(rows)], [0])
        fill(buffer, [3, 4])
        check(rows, [2])

        def late(*args):
            monkeypatch.undo()
            fill(buffer, [5])  # instead of step 2, whose turn it is
            return read(*args)

        for ask in (lambda: reader.series("png"), lambda: [row["png"] for row in reader.between().unbind(0)]):
            kept = reader.steps[1:].tolist()
            monkeypatch.setattr(RowFiles, "read", late)
            assert ask() == [png(step) for step in kept]


def test_rows_written_together_have_files_each(path):
    with ArtifactBuffer(path, capacity=3) as buffer:
        buffer.declare("a", files=["t"])
        rows = TensorDict({"t": torch.arange(10.0).reshape(5, 2), "x": torch.arange(5)}, [5])
        positions = buffer.extend("a", rows, step=7)
        assert buffer["a"].series("x").tolist() == [2, 3, 4]
        assert torch.equal(torch.stack(buffer["a"].series("t")), rows["t"][2:])
        assert positions.tolist() == [0, 1, 2]


def test_rows_written_together_are_refused_together(buffer):
    fill(buffer, [1])
    good, wrong = TensorDict(values(2)), TensorDict({**values(3), "x": torch.ones(2)})
    rows = TensorDict.lazy_stack([good, wrong])
    with pytest.raises(SchemaError, match="'x' has shape"):
        buffer.extend("a", rows, step=5)
    assert buffer["a"].steps.tolist() == [1]


def test_a_view_is_saved_without_what_it_is_a_view_of(path, buffer):
    whole = torch.zeros(1000, 1000)
    buffer.declare("a", files=["fit", "t"])
    buffer.append("a", {"t": whole[0], "fit": {"row": whole[1], "many": torch.zeros(1).expand(10)}}, step=0)
    assert sum(file.stat().st_size for file in (path / "a").glob("*.pt")) < 20_000
    assert torch.equal(buffer["a"].at(0)["fit", "many"], torch.zeros(10))


def test_a_value_that_could_not_be_read_back_is_refused(buffer):
    fill(buffer, [1])
    row = values(2) | {"t": TensorDict({"w": torch.ones(2), "from": NonTensorData(Path("x"))})}
    with pytest.raises(SchemaError, match="'t'"):
        buffer.append("a", row, step=2)
    check(buffer["a"], [1])


def test_an_artifact_can_be_declared_again_as_it_was(path):
    for step in (1, 2):
        with ArtifactBuffer(path, resume=True) as buffer:
            buffer.declare("a", files=[FIT, "t"])  # and bytes are kept in files without being declared
            buffer.append("a", values(step), step=step)
    check(ArtifactBuffer.open(path)["a"], [1, 2])


@pytest.mark.parametrize(("size", "least"), [(100, 60), (10_000, 10), (500_000, 0)])
def test_max_bytes_counts_files(path, size, least):
    with ArtifactBuffer(path, max_bytes=300_000) as buffer:
        for step in range(60):
            if step == 30:
                buffer = ArtifactBuffer(path, resume=True)
            with contextlib.suppress(TdhookTrainError if size > 300_000 else ()):
                buffer.append("a", {"x": torch.full((150,), float(step)), "png": bytes(size)}, step=step)
            assert sum(f.stat().st_size for f in path.glob("a/*") if f.name != "schema.json") <= 300_000
        assert not least or len(buffer["a"]) >= least


def full(real):
    def write(self, data):
        if self.name.endswith("png.tmp"):
            real(self, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return real(self, data)

    return write


def test_a_row_whose_files_find_no_room_is_none(path, buffer, monkeypatch):
    fill(buffer, [1])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full(Path.write_bytes))
        with pytest.raises(DiskError, match="no room for the files of a row of 'a'"):
            fill(buffer, [2])
    assert not list((path / "a").glob(".*"))
    check(buffer["a"], [1])
    check(ArtifactBuffer.open(path)["a"], [1])
    buffer.append("a", values(3) | {"t": b"bytes this time"}, step=3)
    assert ArtifactBuffer.open(path)["a"].at(3)["t"] == b"bytes this time"


@pytest.mark.parametrize("ending", ["png", "t.pt", "fit.dictionary.pt"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("damaged", ["raise", "skip"])
def test_a_damaged_file_is_named_and_the_rest_is_read(path, ending, how, damaged):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, WRITTEN)
    file = sorted((path / "a").glob(f"*.{ending}"))[WRITTEN.index(2)]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data[:-1] if how == "cut" else data)
    named = r"the file of key .* is missing" if how == "missing" else file.name
    if how == "missing":
        file.unlink()
    run = ArtifactBuffer.open(path, damaged=damaged)
    if damaged == "skip":
        with pytest.warns(DamagedWarning, match="left out"):
            check(run["a"], [0, 1, 3])
    else:
        assert run["a"].series("x").tolist() == [0, 1, 2, 3]
        check([run["a"].at(1), run["a"].at(3)], [1, 3])
        with pytest.raises(DamagedError, match=named):
            run["a"].at(2)
    assert len(run.verify()) == 1


def die(path, owner, move):
    buffer = ArtifactBuffer(path, capacity=4)
    for step in range(5):
        if step == 4:
            setattr(owner, move, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        buffer.append("a", {"x": float(step), "png": b"%d" % step}, step=step)


@pytest.mark.parametrize(
    ("owner", "move", "there"),
    [
        (Path, "replace", range(4)),
        (CommitFile, "commit", range(4)),
        (RowWriter, "drop", range(5)),  # one too many, never one too few
        (CommitFile, "drop", range(5)),
        (RowFiles, "drop", range(1, 5)),
    ],
)
def test_a_writer_killed_between_two_moves_leaves_whole_rows_and_the_next_one_sweeps(forked, path, owner, move, there):
    assert forked(lambda: die(path, owner, move)) == ""
    artifact, pictures = ArtifactBuffer.open(path)["a"], [b"%d" % step for step in there]
    assert artifact.series("png") == pictures
    with ArtifactBuffer(path, resume=True) as buffer:
        assert buffer["a"].series("png") == artifact.series("png") == pictures[-4:]
        assert sorted(file.read_bytes() for file in (path / "a").glob("*.png")) == pictures[-4:]
        assert not list((path / "a").glob(".*"))
        buffer.append("a", {"x": 7.0, "png": b"7"}, step=7)
    assert artifact.series("png") == [*pictures[-4:], b"7"][-4:]
