"""What is written is what is read, whatever its dtype, shape or number."""

import os

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict
from torch.testing import assert_close

from tdhook_train.buffer import ArtifactBuffer, row_writer
from tdhook_train.errors import ClosedError, DiskError, SchemaError, SettingsError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
]  # fmt: skip


def values(dtype, n):
    generator = torch.Generator().manual_seed(n)
    return (torch.randn(n, 3, 2, generator=generator, dtype=torch.float64) * 50).to(dtype)


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_come_back_bit_by_bit_from_the_writer_and_from_a_reader(path, dtype):
    written = values(dtype, 5)
    with ArtifactBuffer(path) as buffer:
        for step, value in enumerate(written):
            buffer.append("a", {"x": value}, step=step)
        assert torch.equal(buffer["a"].series("x"), written)
    read = ArtifactBuffer.open(path)["a"].series("x")
    assert read.dtype == dtype
    assert torch.equal(read, written)


def test_nan_and_infinities_are_kept(buffer):
    row = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    buffer.append("a", {"x": row}, step=0)
    assert torch.equal(buffer["a"].at(0)["x"].view(torch.int32), row.view(torch.int32))


def test_growth_over_several_doublings_loses_nothing(path, monkeypatch):
    monkeypatch.setattr(row_writer, "_FIRST_ROWS", 2)
    with ArtifactBuffer(path) as buffer:
        for step in range(300):
            buffer.append("a", {"x": torch.full((7,), step), "y": torch.tensor(step / 2)}, step=step)
        written = buffer["a"]
        assert written.storage.disk.capacity == 512
    for artifact in (written, ArtifactBuffer.open(path)["a"]):
        assert torch.equal(artifact.series("x"), torch.arange(300)[:, None].expand(300, 7))
        assert torch.equal(artifact.series("y"), torch.arange(300) / 2)


def test_a_tensor_read_before_the_files_grow_stays_valid(buffer, monkeypatch):
    monkeypatch.setattr(row_writer, "_FIRST_ROWS", 2)
    buffer.append("a", {"x": torch.ones(1000)}, step=0)
    view = buffer["a"].storage[:]["x"]
    for step in range(1, 100):
        buffer.append("a", {"x": torch.zeros(1000)}, step=step)
    assert torch.equal(view, torch.ones(1, 1000))


def test_scalars_empty_tensors_and_numbers_are_rows_too(buffer):
    buffer.append("a", {"s": torch.tensor(3.0), "none": torch.empty(0, 4), "n": 2, "f": 0.5, "np": np.ones(2)}, step=1)
    row = buffer["a"].at(1)
    assert row["s"] == 3
    assert row["none"].shape == (0, 4)
    assert row["n"].dtype == torch.int64
    assert row["f"] == 0.5
    assert row["np"].dtype == torch.float64


@pytest.mark.parametrize(
    "rows", [{}, {"x": "text"}, {"x": NonTensorData("text")}, {"x": [torch.ones(2), "a"]}, TensorDict(), torch.ones(2)]
)
def test_what_holds_no_tensor_is_refused(buffer, rows):
    with pytest.raises(SchemaError):
        buffer.append("a", rows, step=0)
    assert "a" not in buffer


@pytest.mark.parametrize("key", ["meta", ("meta", "step"), "index"])
def test_keys_that_belong_to_the_buffer_are_refused(buffer, key):
    with pytest.raises(SchemaError, match="reserved"):
        buffer.append("a", {key: torch.ones(2)}, step=0)


def test_a_tensordict_is_one_row_whatever_its_batch_size_and_is_not_changed(buffer):
    td = TensorDict({"attr": {"obs": torch.ones(5, 3)}}, [5])
    before = td.clone()
    buffer.append("a", td, step=0)
    assert buffer["a"].series(("attr", "obs")).shape == (1, 5, 3)
    assert (td == before).all()
    assert set(td.keys(True, True)) == {("attr", "obs")}


def test_rows_are_detached_copies(buffer):
    x = torch.ones(3, requires_grad=True)
    buffer.append("a", {"x": x * 2}, step=0)
    buffer.append("a", {"x": x.expand(3)}, step=1)
    with torch.no_grad():
        x.zero_()
    assert_close(buffer["a"].series("x"), torch.tensor([[2.0, 2, 2], [1, 1, 1]]))
    assert not buffer["a"].at(0)["x"].requires_grad


def test_transposed_and_conjugate_values_are_written_as_they_look(buffer):
    x = torch.randn(3, 4, dtype=torch.complex64)
    buffer.append("a", {"t": x.T, "h": x.conj()}, step=0)
    assert torch.equal(buffer["a"].at(0)["t"], x.T.clone())
    assert torch.equal(buffer["a"].at(0)["h"], x.conj().resolve_conj())


def test_a_buffer_begun_in_inference_mode_goes_on_outside_of_it(buffer):
    row = {"x": torch.ones(2), "none": torch.empty(0)}
    with torch.inference_mode():
        buffer.append("a", row, step=0)
        buffer.append("a", row, step=1)
    for step in range(2, 9):
        buffer.append("a", row, step=step)
    assert torch.equal(buffer["a"].series("x"), torch.ones(9, 2))


def test_meta_is_stored_with_its_dtypes(buffer):
    given = {"step": 3, "frames": 2**40, "epoch": 2, "weights": 2**64 - 1, "data": -5, "attempt": 4}
    buffer.append("a", {"x": 1}, **given, cost=0.25, time=1e9 + 0.5)
    meta = buffer["a"].at(3)["meta"]
    assert {key: int(meta[key]) for key in given} == given | {"weights": -1}
    assert all(meta[key].dtype == torch.int64 for key in given)
    assert meta["time"].dtype == meta["cost"].dtype == torch.float64
    assert (float(meta["time"]), float(meta["cost"])) == (1e9 + 0.5, 0.25)


@pytest.mark.parametrize("wrong", [{"step": 1.5}, {"step": None}, {"weights": 2**64}, {"cost": "long"}])
def test_meta_that_is_no_number_is_refused_and_takes_no_row(buffer, wrong):
    with pytest.raises(SettingsError):
        buffer.append("a", {"x": 1}, **({"step": 0} | wrong))
    assert "a" not in buffer


def test_positions_count_up(buffer):
    assert [buffer.append("a", {"x": 1}, step=9 - i) for i in range(5)] == [0, 1, 2, 3, 4]


def test_a_full_disk_is_an_error_that_loses_nothing_and_passes(path, fill, monkeypatch):
    monkeypatch.setattr(row_writer, "_FIRST_ROWS", 4)
    buffer = ArtifactBuffer(path)
    fill(buffer, range(4))
    real, calls = os.posix_fallocate, []

    def full(fd, *args):
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(fd, *args)

    monkeypatch.setattr(os, "posix_fallocate", full)
    used = sum(file.stat().st_size for file in (path / "probe").iterdir())
    with pytest.raises(DiskError, match=r"No space left on device: no room for 4 more rows .* of 'probe'") as caught:
        fill(buffer, [4])
    assert caught.value.errno == 28
    assert buffer["probe"].steps.tolist() == [0, 1, 2, 3]
    assert sum(file.stat().st_size for file in (path / "probe").iterdir()) == used
    fill(buffer, range(4, 20))
    assert torch.equal(buffer["probe"].series("attr")[:, 0, 0], torch.arange(20.0))
    buffer.close()


def test_a_closed_buffer_takes_no_more_but_can_be_read(path, fill):
    with ArtifactBuffer(path) as buffer:
        fill(buffer, range(3))
    buffer.close()
    for write in (lambda: fill(buffer, [3]), lambda: buffer.note("x"), lambda: buffer.truncate(0)):
        with pytest.raises(ClosedError, match="resume=True"):
            write()
    with pytest.raises(ClosedError):
        buffer["probe"].extend(buffer["probe"][:])
    assert len(buffer["probe"]) == 3


def test_flush_and_the_end_leave_all_rows(path, fill):
    buffer = ArtifactBuffer(path)
    fill(buffer, range(3))
    buffer.flush()
    fill(buffer, range(3, 6))
    assert ArtifactBuffer.open(path)["probe"].steps.tolist() == list(range(6))
    buffer.close()
