"""What stays where there are too many rows, against the rules written out slowly."""

import math
import random
import tempfile
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from tensordict import TensorDict

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import SchemaError, SettingsError

NAN = math.nan
RULES = ["newest", "log-spaced", ("largest", "score"), ("smallest", "score")]


class Row(NamedTuple):
    n: int  # counts the rows that were ever written, and stands in every number of the row
    step: int
    score: float


def victim(rows, keep):
    if keep == "newest":
        return 0
    if keep == "log-spaced":
        steps = sorted({row.step for row in rows})
        logs = np.log1p(steps)  # as there: which of two equal gaps goes is left to rounding
        gaps = [(logs[i + 1] - logs[i - 1], steps[i]) for i in range(1, len(steps) - 1)]
        gone = min(gaps)[1] if gaps else steps[0]
        return [row.step for row in rows].index(gone)
    sign = 1 if keep[0] == "largest" else -1
    return min(range(len(rows)), key=lambda i: (0, 0) if math.isnan(rows[i].score) else (1, sign * rows[i].score))


class Model:
    def __init__(self, keep, capacity):
        self.keep, self.capacity, self.rows, self.written = keep, capacity, [], 0

    def add(self, step, score):
        row = Row(self.written, step, score)
        self.written += 1
        self.rows.append(row)
        self.let_go()
        return row

    def let_go(self):
        while self.capacity is not None and len(self.rows) > self.capacity:
            del self.rows[victim(self.rows, self.keep)]

    def positions(self, rows):
        return [self.rows.index(row) for row in rows if row in self.rows]


def values(row):
    wide = torch.full((40,), float(row.n))
    return {"n": row.n, "score": torch.tensor(row.score, dtype=torch.float32), "wide": wide}


def batch(rows):
    n, step = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (0, 1))
    score = torch.tensor([row.score for row in rows], dtype=torch.float32)
    wide = n.float()[:, None].expand(-1, 40)
    return TensorDict({"n": n, "score": score, "wide": wide, "meta": {"step": step}}, [len(rows)])


def check(artifact, rows):
    assert len(artifact) == len(rows)
    assert artifact["n"].tolist() == [row.n for row in rows]
    assert artifact[:]["n"].tolist() == [row.n for row in rows]
    ordered = sorted(rows, key=lambda row: row.step)
    found = artifact.between()
    assert found["n"].tolist() == [row.n for row in ordered]
    assert artifact.steps.tolist() == found["meta", "step"].tolist() == [row.step for row in ordered]
    assert torch.equal(found["wide"], found["n"].float()[:, None].expand(-1, 40))
    scores = torch.tensor([row.score for row in ordered], dtype=torch.float32)
    torch.testing.assert_close(artifact.series("score"), scores, rtol=0, atol=0, equal_nan=True)
    for row in {row.step: row for row in ordered}.values():
        assert int(artifact.at(row.step)["n"]) == row.n


def draw(n, seed=0):
    generator = random.Random(seed)
    return [(max(0, i + generator.randint(-9, 3)), generator.choice([NAN, 0.0, 1.0, i / 8, -i / 8])) for i in range(n)]


def bytes_on_disk(folder):
    return sum(file.stat().st_size for file in folder.iterdir() if file.name != "schema.json")


@pytest.mark.parametrize("capacity", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("keep", RULES, ids=str)
def test_what_stays_after_each_append_is_what_the_rule_says(path, keep, capacity):
    model = Model(keep, capacity)
    with ArtifactBuffer(path, capacity=capacity, keep=keep) as buffer:
        for i, (step, score) in enumerate(draw(90)):
            row = model.add(step, score)
            position = buffer.append("a", values(row), step=step)
            assert position == (model.positions([row]) or [-1])[0]
            if i % 8 == 0:
                check(buffer["a"], model.rows)
    check(ArtifactBuffer.open(path)["a"], model.rows)


@pytest.mark.parametrize("size", [1, 4, 5, 6, 40, 45, 46, 130])
@pytest.mark.parametrize("keep", ["newest", ("largest", "score"), ("smallest", "score")], ids=str)
def test_rows_written_together_stay_as_if_written_one_by_one(path, keep, size):
    model = Model(keep, 40)  # which leaves 5 places spare
    rows = draw(130)
    with ArtifactBuffer(path, capacity=40, keep=keep) as buffer:
        for start in range(0, len(rows), size):
            written = [model.add(*row) for row in rows[start : start + size]]
            positions = buffer["a"].extend(batch(written)) if start else buffer.extend("a", batch(written))
            assert positions.tolist() == model.positions(written)
        check(buffer["a"], model.rows)
    check(ArtifactBuffer.open(path)["a"], model.rows)


@pytest.mark.parametrize("size", [1, 5, 6, 45, 200])
def test_log_spaced_steps_span_the_run_evenly_however_many_are_written_at_once(path, size):
    with ArtifactBuffer(path, capacity=40, keep="log-spaced") as buffer:
        for start in range(0, 2000, size):
            rows = [Row(n, n, 0.0) for n in range(start, min(start + size, 2000))]
            buffer.extend("a", batch(rows))
        steps = buffer["a"].steps
    assert (len(steps), int(steps[0]), int(steps[-1])) == (40, 0, 1999)
    apart = torch.log1p(steps.double()).diff()[steps[1:] - steps[:-1] > 1]
    assert apart.max() < 3 * math.log(2000) / 40


STEPS = st.integers(0, 25)
ROWS = st.tuples(STEPS, st.sampled_from([NAN, 0.0, 1.0, 2.0, 3.0]))
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("append"), ROWS),
        st.tuples(st.just("extend"), st.lists(ROWS, max_size=12)),
        st.tuples(st.just("truncate"), STEPS),
        st.tuples(st.just("reopen"), st.sampled_from(["resume", "a"])),
        st.tuples(st.just("limit"), st.integers(1, 9)),
    ),
    max_size=12,
)


def do(move, what, buffer, model):
    if move == "append":
        row = model.add(*what)
        assert buffer.append("a", values(row), step=row.step) == (model.positions([row]) or [-1])[0]
    elif move == "extend":
        rows = [model.add(*each) for each in what]
        assert buffer.extend("a", batch(rows)).tolist() == model.positions(rows)
    elif move == "truncate":
        buffer.truncate(what)
        model.rows = [row for row in model.rows if row.step <= what]
    elif move == "limit" and model.capacity is not None and model.keep != "log-spaced":
        # places that a smaller limit leaves are filled at once, and of log-spaced steps then go several at a time
        buffer.declare("a", capacity=what, keep=model.keep)
        model.capacity = what
        model.let_go()


def play(moves, model, folder):
    buffer, reader = ArtifactBuffer(folder), None
    for move, what in moves:
        if "a" not in buffer:
            buffer.declare("a", capacity=model.capacity, keep=model.keep)
        if move == "reopen":
            buffer.close()
            buffer = ArtifactBuffer(folder, resume=True) if what == "resume" else ArtifactBuffer.open(folder, "a")
        else:
            do(move, what, buffer, model)
        if "a" in buffer:
            reader = reader or ArtifactBuffer.open(folder)
            check(buffer["a"], model.rows)
            check(reader["a"], model.rows)
    buffer.close()
    assert "a" not in buffer or ArtifactBuffer.open(folder)["a"]["n"].tolist() == [row.n for row in model.rows]


TOO_MANY = [("extend", [(5, 1.0), (3, NAN), (9, 0.0), (9, 2.0), (4, 3.0), (1, 3.0), (2, 0.0)]), ("append", (7, 1.0))]
FOUR, THREE = [(6, 0.0), (7, 1.0), (1, 2.0), (8, 3.0)], [(1, 0.0), (2, 0.0), (3, 0.0)]
EMPTIED = [("extend", FOUR), ("truncate", 5), ("truncate", 0), ("extend", THREE)]


@pytest.mark.parametrize("examples", [10, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("keep", [None, *RULES], ids=str)
def test_whatever_is_done_the_rows_are_those_of_a_plain_list(keep, examples):
    @settings(max_examples=examples, deadline=None, report_multiple_bugs=False)
    @given(MOVES, st.integers(1, 9))
    @example(TOO_MANY, 3)
    @example(EMPTIED, 4)
    def run(moves, capacity):
        with tempfile.TemporaryDirectory() as folder:
            play(moves, Model(keep or "newest", capacity if keep else None), Path(folder) / "run")

    run()


@pytest.mark.parametrize("rule", ["largest", "smallest"])
def test_a_nan_goes_before_every_number(path, rule):
    worst = -math.inf if rule == "largest" else math.inf
    with ArtifactBuffer(path, capacity=2, keep=(rule, "score")) as buffer:
        for step, score in enumerate([worst, NAN, worst, NAN]):
            buffer.append("a", {"score": score}, step=step)
        assert buffer["a"].steps.tolist() == [0, 2]


def test_whole_numbers_are_told_apart_however_large_they_are(path):
    with ArtifactBuffer(path, capacity=1, keep=("largest", "count")) as buffer:
        buffer.append("a", {"count": 2**60 + 1}, step=0)
        assert buffer.append("a", {"count": 2**60}, step=1) == -1


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float64])
def test_a_score_has_any_real_dtype_and_lies_under_any_key(path, dtype):
    with ArtifactBuffer(path, capacity=2, keep=("smallest", ("net", "score"))) as buffer:
        for step, score in enumerate([1, 0, 1, 0, 1]):
            buffer.append("a", {("net", "score"): torch.tensor([score], dtype=dtype)}, step=step)
        assert buffer["a"].steps.tolist() == [1, 3]


def test_an_artifact_has_the_limit_it_was_declared_with_or_else_that_of_the_run(path):
    with ArtifactBuffer(path, capacity=4) as buffer:
        buffer.declare("few", capacity=2, keep="log-spaced")
        for _ in range(2):
            for step in range(10):
                buffer.append("few", {"x": 1.0}, step=step)
                buffer.append("many", {"x": 1.0}, step=step)
            buffer.close()
            buffer = ArtifactBuffer(path, resume=True)  # what was stored holds
        assert buffer["few"].steps.tolist() == [9, 9]
        assert buffer["many"].steps.tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize("keep", RULES, ids=str)
def test_a_limit_can_be_changed_both_ways(path, keep):
    model = Model(keep, None)
    for capacity in (12, 5, 30, 1, 9):
        with ArtifactBuffer(path, resume=True) as buffer:
            buffer.declare("a", capacity=capacity, keep=keep)
            model.capacity = capacity
            model.let_go()
            assert "a" not in buffer or buffer["a"]["n"].tolist() == [row.n for row in model.rows]
            for step, score in draw(40, capacity):
                row = model.add(step, score)
                buffer.append("a", values(row), step=step)
            check(buffer["a"], model.rows)


def test_a_limit_that_is_refused_changes_nothing(path):
    with ArtifactBuffer(path, capacity=5) as buffer:
        for step in range(5):
            buffer.append("a", {"x": 1.0, "pair": torch.ones(2)}, step=step)
        for error, wrong in (
            (SchemaError, {"capacity": 2, "keep": ("largest", "y")}),
            (SchemaError, {"capacity": 2, "keep": ("largest", "pair")}),
            (SettingsError, {"max_bytes": 10}),
            (SettingsError, {"capacity": 0}),
        ):
            with pytest.raises(error):
                buffer.declare("a", **wrong)
            assert buffer["a"].steps.tolist() == [0, 1, 2, 3, 4]


NO_RULES = ["newst", "largest", 5, (), ("largest",), ("newest", "score"), ("largest", 3), ("largest", "a", "b")]
NO_LIMITS = [{"capacity": 0}, {"capacity": 2.5}, {"max_bytes": -1}, {"max_bytes": "1 GB"}]


@pytest.mark.parametrize("wrong", [*({"keep": keep} for keep in NO_RULES), *NO_LIMITS], ids=str)
def test_a_setting_that_is_none_is_refused_when_it_is_given(path, wrong):
    with pytest.raises((SettingsError, SchemaError), match=f"{next(iter(wrong))}="):
        ArtifactBuffer(path, **{"capacity": 2, **wrong})
    assert not path.exists()


@pytest.mark.parametrize("size", [1, 7, 300])
@pytest.mark.parametrize("keep", RULES, ids=str)
def test_max_bytes_bounds_what_lies_on_the_disk(path, keep, size):
    limit, rows = 100_000, [Row(n, n, n % 17) for n in range(900)]
    with ArtifactBuffer(path, max_bytes=limit, keep=keep) as buffer:
        for start in range(0, len(rows), size):
            buffer.extend("a", batch(rows[start : start + size]))
            assert bytes_on_disk(path / "a") <= limit
        artifact = buffer["a"]
        assert len(artifact) * artifact.storage.disk.row_bytes > limit / 2  # what it is given is used
        check(artifact, [rows[n] for n in artifact["n"].tolist()])
