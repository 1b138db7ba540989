"""What is damaged or missing is named; everything else is read, and is never written over."""

import contextlib
import os
import struct
import warnings

import pytest
import torch
from tensordict import TensorDict

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.buffer.places import Places
from tdhook_train.buffer.row import META
from tdhook_train.errors import DamagedError, DamagedWarning

STEPS = [0, 10, 20, 30, 40, 50]
COLUMNS = {"000.attr.column": ("attr", 800), "001.net.code.column": (("net", "code"), 24)}  # bytes a row
FIELDS = {"word": 8, **{name: 8 for _, name in META}, "attr's checksum": 4, "code's checksum": 4, "checksum": 4}
RECORD = 96  # of these 92 bytes, in whole numbers of eight; one record stands before that of the first row


@pytest.fixture(params=["nothing dropped", "some dropped"])
def run(path, fill, request):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, STEPS)
        if request.param == "some dropped":
            fill(buffer, [60, 70])
            buffer.truncate(50)
    return path


@contextlib.contextmanager
def flipped(file, at, mask):
    data = file.read_bytes()
    for change in (mask, 0):
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(bytes([data[at] ^ change]))
        if change:
            yield


def check(artifact, steps):
    assert artifact.steps.tolist() == steps
    for key in ("attr", ("net", "code")):
        values = artifact.series(key).flatten(1)
        assert torch.equal(values, torch.tensor(steps)[:, None].to(values).expand_as(values))


def flip_record(run, row, field, byte=0):
    before = list(FIELDS).index(field)
    return flipped(run / "probe" / "commits", RECORD * (1 + row) + sum([*FIELDS.values()][:before]) + byte, 0x81)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_flipped_byte_of_a_value_is_named_and_all_else_is_read(run, name):
    key, size = COLUMNS[name]
    other = next(known for known, _ in COLUMNS.values() if known != key)
    named = rf"{name} does not hold what was written: key .* of row 3 is damaged \(step 30\)"
    for byte in (*range(8), *range(size - 8, size)):
        with flipped(run / "probe" / name, 3 * size + byte, 0x10):
            artifact = ArtifactBuffer.open(run)["probe"]
            for read in (
                lambda a: a.at(30), lambda a: a[3], lambda a: a[:], lambda a: a[key], lambda a: a.series(key),
                lambda a: a.last(3), lambda a: a.where(key, lambda v: v.flatten(1)[:, 0] > 20), list,
            ):  # fmt: skip
                with pytest.raises(DamagedError, match=named):
                    read(artifact)
            with pytest.raises(DamagedError, match=rf"{name} does not hold what was written: key .* of row"):
                artifact.sample(99)
            for step in (0, 10, 20, 40, 50):
                assert (artifact.at(step)["attr"] == step).all()
            assert (artifact.at(30, keys=[other])[other] == 30).all()
            assert artifact.series(other).flatten(1)[:, 0].tolist() == STEPS
            assert len(damages := ArtifactBuffer.open(run).verify()) == 1
            assert "row 3 is damaged (step 30)" in damages[0]
            with pytest.warns(DamagedWarning, match="probe: row 3 is damaged and left out"):
                check(ArtifactBuffer.open(run, damaged="skip")["probe"], [0, 10, 20, 40, 50])
    assert ArtifactBuffer.open(run).verify() == []


@pytest.mark.parametrize("field", FIELDS)
def test_a_flipped_byte_of_a_record_is_named_and_its_row_left_out(run, field):
    begins = sum([*FIELDS.values()][: list(FIELDS).index(field)])
    for byte in range(begins, begins + FIELDS[field]):
        for mask in (0x01, 0x80):
            with flipped(run / "probe" / "commits", 4 * RECORD + byte, mask):
                reader = ArtifactBuffer.open(run)
                with pytest.warns(DamagedWarning, match="probe: row 3 is damaged and left out"):
                    check(reader["probe"], [0, 10, 20, 40, 50])
                assert "row 3 is damaged" in reader.verify()[0]
        with (
            flipped(run / "probe" / "commits", 4 * RECORD + byte, 0x81),
            ArtifactBuffer.open(run, "a") as writer,
            pytest.warns(DamagedWarning, match="probe: row 3 is damaged and left out"),
        ):
            check(writer["probe"], [0, 10, 20, 40, 50])


def test_a_record_of_zeros_is_named(run):
    with (run / "probe" / "commits").open("r+b") as file:
        file.seek(4 * RECORD)
        file.write(bytes(RECORD))
    with pytest.warns(DamagedWarning, match="probe: row 3 is damaged and left out"):
        check(ArtifactBuffer.open(run)["probe"], [0, 10, 20, 40, 50])


def test_columns_that_changed_places_are_named(path):
    with ArtifactBuffer(path) as buffer:
        for step in range(3):
            buffer.append("a", {"x": torch.tensor(step), "y": torch.tensor(-step)}, step=step)
    x, y, aside = path / "a" / "000.x.column", path / "a" / "001.y.column", path / "aside"
    x.rename(aside), y.rename(x), aside.rename(y)
    with pytest.raises(DamagedError, match="'x' of rows 1, 2 are damaged"):
        ArtifactBuffer.open(path)["a"].series("x")


# --- files that were cut or lost


def contents(run):
    return {file.name: file.read_bytes() for file in (run / "probe").iterdir()}


@pytest.mark.parametrize("left", [None, 0, 3 * 800, 3 * 800 + 5])
def test_a_cut_or_lost_column_is_named_the_rest_is_read_and_no_writer_mends_it(run, fill, left):
    file = run / "probe" / "000.attr.column"
    file.unlink() if left is None else os.truncate(file, left)
    rows = (left or 0) // 800
    artifact, before = ArtifactBuffer.open(run)["probe"], contents(run)
    with pytest.raises(DamagedError, match=r"000\.attr\.column was cut and does not hold what was written"):
        artifact.at(30)
    assert artifact.series(("net", "code"))[:, 0].tolist() == artifact.steps.tolist() == STEPS
    for step in STEPS[:rows]:
        assert (artifact.at(step)["attr"] == step).all()
    with pytest.warns(DamagedWarning, match="left out"):
        check(ArtifactBuffer.open(run, damaged="skip")["probe"], STEPS[:rows])
    with (
        ArtifactBuffer(run, resume=True) as buffer,
        pytest.raises(DamagedError, match=r"000\.attr\.column was cut or is missing"),
    ):
        fill(buffer, [60])
    assert contents(run) == before


@pytest.mark.parametrize("left", [None, 0, 4 * RECORD, 4 * RECORD + 8])
def test_cut_or_lost_records_are_named_and_no_writer_begins_anew(run, fill, left):
    file = run / "probe" / "commits"
    file.unlink() if left is None else os.truncate(file, left)
    before = contents(run)
    if left:
        with pytest.warns(DamagedWarning, match="commits"):
            check(ArtifactBuffer.open(run)["probe"], STEPS[:3])
    else:
        with pytest.raises(DamagedError, match="commits"):
            ArtifactBuffer.open(run)["probe"]
    with ArtifactBuffer(run, resume=True) as buffer, pytest.raises(DamagedError, match="commits"):
        fill(buffer, [60])
    assert contents(run) == before


def test_lost_records_of_rows_of_zeros_are_named_too(path):
    with ArtifactBuffer(path) as buffer:
        for step in range(6):
            buffer.append("a", {"x": torch.zeros(3), "y": torch.tensor(False)}, step=step)
    os.truncate(path / "a" / "commits", 4 * RECORD)
    with pytest.warns(DamagedWarning, match="commits"):
        assert ArtifactBuffer.open(path)["a"].steps.tolist() == [0, 1, 2]


def test_a_lost_schema_is_written_again_from_the_manifest_and_the_manifest_from_it(run, fill):
    schema, text = run / "probe" / "schema.json", (run / "probe" / "schema.json").read_text()
    schema.unlink()
    check(ArtifactBuffer.open(run)["probe"], STEPS)
    ArtifactBuffer(run, resume=True).close()
    assert schema.read_text() == text
    (run / "manifest.json").unlink()
    with pytest.warns(DamagedWarning, match="missing"):
        check(ArtifactBuffer.open(run)["probe"], STEPS)


def test_rows_that_nothing_describes_any_more_are_not_written_over(run, fill):
    with ArtifactBuffer(run, resume=True) as buffer:
        fill(buffer, [0], "other")
    (run / "manifest.json").unlink()
    (run / "probe" / "schema.json").write_text("")
    before = contents(run)
    with pytest.warns(DamagedWarning, match="missing"):
        buffer = ArtifactBuffer(run, resume=True)
    with pytest.raises(DamagedError, match="probe"):
        fill(buffer, [60])
    buffer.close()
    assert contents(run) == before


# --- writing over what is damaged


@pytest.mark.parametrize("damaged", ["raise", "skip"])
def test_a_resumed_writer_leaves_every_row_where_it_is(run, fill, damaged):
    with contextlib.ExitStack() as stack:
        for row, field, byte in ((1, "epoch", 0), (3, "word", 7), (5, "word", 6)):
            stack.enter_context(flip_record(run, row, field, byte))
        stack.enter_context(flipped(run / "probe" / "000.attr.column", 2 * 800, 0x40))
        before = contents(run)
        with ArtifactBuffer.open(run, "a", damaged=damaged) as buffer:
            with pytest.warns(DamagedWarning, match=r"rows 1, (2, )?3, 5 are damaged"):
                fill(buffer, range(60, 4000, 10))
            buffer.truncate(3000)
            fill(buffer, range(3010, 5000, 10))
            expected = [0, *([20] if damaged == "raise" else []), 40, *range(60, 5000, 10)]
            assert buffer["probe"].series(("net", "code"))[:, 0].tolist() == expected
        after = contents(run)
        for name, size in {"commits": RECORD, **{name: size for name, (_, size) in COLUMNS.items()}}.items():
            lead = RECORD if name == "commits" else 0
            assert after[name][lead : lead + 6 * size] == before[name][lead : lead + 6 * size]


@pytest.mark.parametrize("keep", ["newest", ("largest", "score")])
def test_damaged_rows_do_not_stop_a_writer_with_a_limit(path, keep):
    def add(buffer, steps):
        for step in steps:
            buffer.append("a", {"score": torch.tensor(float(step)), "x": torch.zeros(2)}, step=step)

    with ArtifactBuffer(path, capacity=3, keep=keep) as buffer:
        add(buffer, range(20))
    by_score = keep != "newest"  # the flip then makes the largest score of all
    name, at, size = ("000.score.column", 0, 4) if by_score else ("commits", RECORD + 8, RECORD)
    data = (path / "a" / name).read_bytes()
    value = struct.pack("f", 18) if by_score else struct.pack("q", 18)
    place = next(i for i in range(4) if data[at + i * size :].startswith(value))
    with flipped(path / "a" / name, at + place * size + 3, 0x3C), warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedWarning)
        with ArtifactBuffer(path, resume=True) as buffer:
            add(buffer, range(20, 30))
            assert buffer["a"].series("score").tolist() == [27, 28, 29]


def test_an_interrupted_extend_leaves_nothing_that_comes_back(path, fill, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with ArtifactBuffer(path) as buffer:
        buffer.append("a", {"attr": torch.tensor(0.0)}, step=0)
        values = TensorDict({"attr": torch.arange(10.0, 15), "meta": {"step": torch.arange(10, 15)}}, [5])
        with monkeypatch.context() as patch:
            patch.setattr(Places, "extend", interrupt)
            with pytest.raises(KeyboardInterrupt):
                buffer.extend("a", values)
        held = buffer["a"].steps.tolist()
        buffer.append("a", {"attr": torch.tensor(1.0)}, step=1)
    assert held in ([0], [0, 10, 11, 12, 13, 14])
    assert ArtifactBuffer.open(path)["a"].series("attr").tolist() == sorted([*held, 1])
