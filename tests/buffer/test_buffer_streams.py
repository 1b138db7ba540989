"""Many rows a tick, read back by samplers, by condition and as files for others."""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch
from tensordict import TensorDict
from torchrl.data.replay_buffers import RandomSampler, SamplerWithoutReplacement, SliceSampler
from torchrl.envs.transforms import RenameTransform

from tdhook_train.buffer import ArtifactBuffer, query, row_writer
from tdhook_train.buffer.places import Places
from tdhook_train.errors import SchemaError, SettingsError

STEP, N = ("meta", "step"), 12  # rows a tick


def tick(step, n=N):
    unit = torch.arange(n) + 1000 * step
    return TensorDict({"act": unit.float()[:, None].expand(n, 5), "net": {"unit": unit}, "ep": unit // 4}, [n])


def numbers(step, n=N):
    return list(range(1000 * step, 1000 * step + n))


@pytest.fixture
def stream(buffer):
    for step in (3, 1, 2):
        buffer.extend("act", tick(step), step=step)
    return buffer["act"]


def check(rows):
    assert torch.equal(rows["act"], rows["net", "unit"].float()[:, None].expand(-1, 5))
    assert torch.equal(rows["net", "unit"] // 1000, rows["meta", "step"])


def test_all_rows_of_a_tick_are_there_with_what_describes_them(path, monkeypatch):
    monkeypatch.setattr(row_writer, "_FIRST_ROWS", 4)  # so that files grow, also by more than they hold
    with ArtifactBuffer(path) as buffer:
        for step, n in ((0, 1), (1, 3), (2, 1), (3, 70), (4, 2)):
            given = tick(step, n)
            positions = buffer.extend("act", given, step=step, frames=7 * step, cost=step / 2, weights=2**64 - 1)
            assert positions.tolist() == list(range(len(buffer["act"])))[-n:]
            assert set(given.keys()) == {"act", "net", "ep"}
        rows = ArtifactBuffer.open(path)["act"][:]
        assert rows["net", "unit"].tolist() == [u for step, n in enumerate((1, 3, 1, 70, 2)) for u in numbers(step, n)]
        check(rows)
        assert torch.equal(rows["meta", "frames"], 7 * rows[STEP])
        assert torch.equal(rows["meta", "cost"], rows[STEP] / 2.0)
        assert (rows["meta", "weights"] == -1).all()


def test_rows_are_the_first_batch_dimension_whatever_the_others(buffer):
    x = torch.randn(4, 3, 2, requires_grad=True)
    rows = TensorDict({"x": x * 1.0, "n": TensorDict({"y": torch.arange(12).reshape(4, 3)}, [4, 3])}, [4, 3])
    assert buffer.extend("a", rows, step=0).tolist() == [0, 1, 2, 3]
    assert torch.equal(buffer["a"].series("x"), x.detach())
    assert buffer["a"][2]["n", "y"].tolist() == [6, 7, 8]


WRONG = {
    "a shape": (lambda rows: rows.set("act", torch.ones(N, 4)), {"step": 1}, r"'act' has shape \(4,\)"),
    "a dtype": (lambda rows: rows.set("ep", torch.ones(N)), {"step": 1}, "'ep' has dtype torch.float32"),
    "an extra key": (lambda rows: rows.set("more", torch.ones(N)), {"step": 1}, "'more' is extra"),
    "a missing key": (lambda rows: rows.exclude("ep"), {"step": 1}, "'ep' is missing"),
    "no step": (lambda rows: rows, {}, r"\('meta', 'step'\) is missing.*step=\.\.\."),
    "a step that is none": (lambda rows: rows, {"step": 1.5}, "step=1.5"),
    "no such meta": (lambda rows: rows, {"step": 1, "episode": 3}, "'episode' is none of"),
    "a meta of its own": (lambda rows: rows.set(STEP, torch.ones(N)), {}, "'step'.* has dtype torch.float32"),
    "one row": (lambda rows: rows[0], {"step": 1}, "batch dimension"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_rows_are_refused_whole_and_begin_nothing(stream, buffer, what):
    change, meta, text = WRONG[what]
    with pytest.raises((SchemaError, SettingsError), match=text):
        buffer.extend("act", change(tick(4)), **meta)
    assert len(stream) == 3 * N
    if what not in ("a shape", "a dtype", "an extra key", "a missing key"):
        with pytest.raises((SchemaError, SettingsError)):
            buffer.extend("new", change(tick(4)), **meta)
        assert "new" not in buffer


def test_rows_may_hold_part_of_what_describes_them(path, stream):
    with ArtifactBuffer(path, resume=True) as buffer:
        given = tick(5).set(STEP, torch.full((N,), 5)).set(("meta", "cost"), torch.full((N,), 0.5, dtype=torch.float64))
        before = time.time()
        assert buffer["act"].extend(given).tolist() == list(range(36, 48))
        assert buffer["act"].add(given[3]) == 48
        assert set(given["meta"].keys()) == {"step", "cost"}
        rows = buffer["act"][36:]
    check(rows)
    meta = rows["meta"]
    assert bool(((meta["time"] >= before) & (meta["time"] <= time.time())).all())
    for key, number in {"cost": 0.5, "attempt": 1, "frames": 0, "epoch": 0, "weights": 0, "data": 0, "run": 0}.items():
        assert (meta[key] == number).all()


def test_iteration_is_in_step_order_through_the_artifact_and_through_its_replays(stream):
    expected = [unit for step in (1, 2, 3) for unit in numbers(step)]
    for rows in (stream, stream.replay(), stream.replay(sampler=SamplerWithoutReplacement()), stream.in_order()):
        assert [int(row["net", "unit"]) for row in rows] == expected
    only = next(stream.in_order(keys=["ep", STEP]))
    assert set(only.keys(True, True)) == {"ep", STEP}


def test_a_replay_has_settings_of_its_own(stream):
    replay = stream.replay(batch_size=7, transform=RenameTransform(["ep"], ["traj"]), seed=5)
    rows = replay.sample()
    assert (rows.batch_size, {*rows.keys()} - {"act", "net", "meta"}) == ((7,), {"traj", "index"})
    check(rows)
    assert "ep" in stream.sample(3)
    with pytest.raises(RuntimeError, match="batch_size"):
        stream.sample()
    assert "traj" in next(iter(stream.replay(transform=RenameTransform(["ep"], ["traj"]))))


@pytest.mark.parametrize("sampler", [None, RandomSampler])
def test_a_seed_gives_the_same_samples_and_another_gives_others(stream, sampler):
    def drawn(seed):
        return stream.replay(batch_size=30, seed=seed, sampler=sampler and sampler()).sample()["index"].tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("prefetch", [None, 3])
def test_an_epoch_over_a_replay_sees_each_row_once_then_those_written_since_too(stream, buffer, prefetch):
    replay = stream.replay(batch_size=9, sampler=SamplerWithoutReplacement(), prefetch=prefetch)
    for _ in range(2):
        rows = torch.cat(list(islice(replay, 4)))
        check(rows)
        assert sorted(rows["net", "unit"].tolist()) == [unit for step in (1, 2, 3) for unit in numbers(step)]
    buffer.extend("act", tick(4), step=4)
    later = stream.replay(batch_size=48, sampler=SamplerWithoutReplacement(), prefetch=prefetch)
    assert sorted(later.sample()["net", "unit"].tolist())[-N:] == numbers(4)


SAMPLERS = {
    "random": RandomSampler,
    "each once": SamplerWithoutReplacement,
    "slices": lambda: SliceSampler(slice_len=2, traj_key="ep", strict_length=False),
    "cached": lambda: SliceSampler(slice_len=2, traj_key="ep", strict_length=False, cache_values=True),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("keep", ["newest", "log-spaced", ("largest", "ep"), ("smallest", "ep")], ids=str)
def test_samples_of_rows_that_were_kept_are_whole_and_there(path, keep, sampler):
    with ArtifactBuffer(path, capacity=20, keep=keep) as buffer:
        buffer.extend("act", tick(0), step=0)
        reader = ArtifactBuffer.open(path)["act"]
        replays = [each.replay(batch_size=10, sampler=SAMPLERS[sampler]()) for each in (buffer["act"], reader)]
        for step in range(1, 9):
            for i in range(N):
                buffer.append("act", tick(step)[i], step=step)
            kept = set(buffer["act"]["net", "unit"].tolist())
            assert len(kept) == 20
            for replay in replays:
                rows = replay.sample()
                check(rows)
                assert set(rows["net", "unit"].tolist()) <= kept
                assert torch.equal(replay[rows["index"].reshape(-1)]["net", "unit"], rows["net", "unit"])


def test_where_asks_one_key_and_gives_the_rows_in_step_order(buffer, stream):
    buffer.declare("a", legend={"why": {0: "fine", 1: "few rows"}})
    for step in (4, 2, 0):
        buffer.append("a", {"why": step // 4, "x": torch.tensor([1.0, step])}, step=step)
    assert stream.where("ep", 250)[STEP].tolist() == [1] * 4
    assert stream.where(("net", "unit"), lambda unit: unit % 1000 == 0)["ep"].tolist() == [250, 500, 750]
    assert stream.where("net.unit", torch.tensor(2003), keys=["ep"])["ep"].tolist() == [500]
    assert buffer["a"].where("why", "fine")[STEP].tolist() == [0, 2]
    assert buffer["a"].where("x", torch.tensor([1.0, 2.0]))[STEP].tolist() == [2]
    with pytest.raises(SettingsError, match="expected one bool for each of 36 rows"):
        stream.where("act", lambda act: act > 0)


NUMBERS = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128"


def same(found, wanted):
    found = torch.tensor(found, dtype=wanted.dtype)
    return found.shape == wanted.shape and torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in NUMBERS.split()], ids=str)
def test_parquet_holds_every_number_bit_by_bit(buffer, tmp_path, monkeypatch, dtype):
    read = pytest.importorskip("pyarrow.parquet").read_table
    monkeypatch.setattr(query, "_CHUNK_ROWS", 4)
    x = (torch.randn(10, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 50).to(dtype)
    if dtype.is_floating_point:
        x[3, 0] = torch.tensor([torch.nan, -0.0])
        x[4, 0] = torch.tensor([torch.inf, -torch.inf])
    for step in reversed(range(10)):
        buffer.append("a", {("n", "x"): x[step], "s": x[step, 0, 0]}, step=step)
    table = read(buffer["a"].to_parquet(tmp_path / "deep" / "rows.parquet"))
    wanted = torch.view_as_real(x) if dtype.is_complex else x.float() if dtype == torch.bfloat16 else x
    assert same(table["n.x"].to_pylist(), wanted.reshape(10, -1))
    assert same(table["s"].to_pylist(), wanted[:, 0, 0])
    assert table["meta.step"].to_pylist() == list(range(10))
    columns = {tuple(each["key"]): each for each in json.loads(table.schema.metadata[b"tdhook_train"])["columns"]}
    assert (columns["n", "x"]["shape"], columns["n", "x"]["dtype"]) == ([3, 2], str(dtype)[6:])
    if not dtype.is_complex:
        tidy = read(buffer["a"].to_parquet(tmp_path / "deep" / "x.parquet", ("n", "x")))
        assert same(tidy["value"].to_pylist(), wanted.reshape(-1))
        assert tidy["step"].to_pylist() == [step for step in range(10) for _ in range(6)]
    buffer.truncate(-1)
    none = read(buffer["a"].to_parquet(tmp_path / "none.parquet"))
    assert (none.num_rows, none.schema.types) == (0, table.schema.types)


def test_a_parquet_file_is_written_whole_or_not_at_all(stream, tmp_path, monkeypatch):
    path, table, calls = stream.to_parquet(tmp_path / "a.parquet"), type(stream)._table, []
    before = path.read_bytes()

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return table(*args)

    monkeypatch.setattr(query, "_CHUNK_ROWS", 4)
    monkeypatch.setattr(type(stream), "_table", stop)
    with pytest.raises(KeyboardInterrupt):
        stream.to_parquet(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.glob("*.parquet*")] == ["a.parquet"]


def test_keys_that_read_alike_with_dots_are_both_in_every_table(buffer, tmp_path):
    read = pytest.importorskip("pyarrow.parquet").read_table
    buffer.append("a", {"n.x": 1.5, ("n", "x"): 2.5}, step=0)
    stored = read(buffer["a"].to_parquet(tmp_path / "a.parquet"))
    for table in (stored.to_pandas(), buffer["a"].to_pandas(), buffer["a"].to_xarray()):
        assert {1.5, 2.5} <= {float(table[name].values[0]) for name in table}


def test_rows_written_in_two_threads_are_all_there(path, stream):
    def write(extend, step):
        for _ in range(200):
            extend(tick(step).set(STEP, torch.full((N,), step)))

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, (stream.extend, stream.replay().extend), (4, 5)))
    for rows in (stream[:], ArtifactBuffer.open(path)["act"][:]):
        check(rows)
        assert torch.bincount(rows[STEP]).tolist() == [0, N, N, N, 200 * N, 200 * N]


def grow_while_read():
    sys.setswitchinterval(1e-5)
    places, done = Places(), threading.Event()
    places.extend(places.next(200_001, 2**31))
    places.remove([0])  # from now on rows lie elsewhere than their number says
    places.extend(places.next(1, 2**31))
    first = places.all()

    def read():
        while not done.is_set():
            if not torch.equal(places.all()[: len(first)], first):
                return "torn"
        return "whole"

    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(read) for _ in range(2)]
        while len(places) < 2_000_000:
            places.extend(places.next(1000, 2**31))
        done.set()
        return [reader.result() for reader in readers]


def test_rows_can_be_read_in_threads_while_others_are_written(forked):
    assert forked(grow_while_read) == "['whole', 'whole']"


@pytest.mark.filterwarnings("ignore::tdhook_train.errors.DamagedWarning")
@pytest.mark.parametrize("file", ["commits", "000.score.column"])
def test_a_damaged_row_does_not_stop_a_writer_that_has_a_limit(path, file):
    with ArtifactBuffer(path, capacity=4, keep=("largest", "score")) as buffer:
        for step in range(4):
            buffer.append("a", {"score": float(step)}, step=step)
    data = bytearray((path / "a" / file).read_bytes())
    data[3 * 88 + 20 if file == "commits" else 2 * 4 + 1] ^= 1  # in row 2
    (path / "a" / file).write_bytes(data)
    with ArtifactBuffer(path, resume=True) as buffer:
        for step in range(4, 14):
            buffer.append("a", {"score": float(step)}, step=step)
        assert buffer["a"].steps.tolist() == [10, 11, 12, 13]
