"""Several runs become one, each row with the label of its run, or nothing is changed."""

import os
import signal

import pytest
import torch
from torch.testing import assert_close

from tdhook_train.buffer import ArtifactBuffer, merging
from tdhook_train.errors import DamagedWarning, KeyMissingError, RunExistsError, SchemaError, SettingsError

RUN = ("meta", "run")
KEYS = ["r2", ("net", "h"), "z", ("meta", "frames"), ("meta", "attempt"), ("meta", "time"), ("meta", "cost")]


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    monkeypatch.setattr(merging, "_AT_ONCE", 3)


def row(seed, step):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    r2 = torch.rand(2, generator=generator)
    r2[0] = torch.nan if step == 2 else r2[0]
    z = torch.randn(3, generator=generator, dtype=torch.complex64)
    return {"r2": r2, "net": {"h": r2.bfloat16()}, "z": z}


def write(path, seed, steps=range(8), **limit):
    with ArtifactBuffer(path, resume=True, **limit) as buffer:
        buffer.declare("probe", dims={"r2": "layer"}, coords={"layer": ["l0", "l1"]}, settings={"alpha": 1.0})
        for step in steps:
            buffer.append("probe", row(seed, step), step=step, frames=10 * step, cost=seed / 2)
        buffer.note("mark", seed=seed)
    return path


@pytest.fixture
def runs(tmp_path):
    return {f"seed {i}": write(tmp_path / f"run_{i}", i, range(i, 9 - i)) for i in range(3)}


@pytest.fixture
def into(tmp_path):
    return tmp_path / "merged"


def check(rows, source):
    expected = source.between()
    assert torch.equal(rows["meta", "step"], expected["meta", "step"])
    for key in KEYS:
        assert_close(rows[key], expected[key], rtol=0, atol=0, equal_nan=True)


def test_every_row_of_every_run_is_there_under_its_label(runs, into):
    merged = ArtifactBuffer.merge(runs, into)
    assert merged.runs == list(runs)
    assert len(merged["probe"]) == 9 + 7 + 5
    for label, path in runs.items():
        check(merged["probe"].where(RUN, label), ArtifactBuffer.open(path)["probe"])
    assert merged["probe"].coords == {"layer": ["l0", "l1"], "dim_0": [0, 1, 2]}
    assert merged["probe"].settings == {"alpha": 1.0}
    assert merged.verify() == []
    with ArtifactBuffer(into, resume=True) as again:
        assert again.runs == list(runs)
    with pytest.raises(SettingsError, match=r"'seed 7' labels no value .* did you mean 'seed"):
        merged["probe"].where(RUN, "seed 7")


def test_tables_say_which_run_a_row_is_from(runs, into):
    probe = ArtifactBuffer.merge(runs, into)["probe"]
    order = sorted((step, i) for i in range(3) for step in range(i, 9 - i))  # rows of one step as the runs were given
    labels = [f"seed {i}" for _, i in order]
    assert probe.steps.tolist() == [step for step, _ in order]
    assert probe.to_pandas()["run"].tolist() == labels
    assert probe.to_xarray()["run"].values.tolist() == labels
    assert_close(probe.to_pandas()["cost"].tolist(), [i / 2 for _, i in order])
    tidy = probe.to_pandas("r2")
    assert tidy["run"].tolist() == [label for label in labels for _ in range(2)]
    values = [float(value) for step, i in order for value in row(i, step)["r2"]]
    assert_close(torch.tensor(tidy["value"].tolist()), torch.tensor(values), rtol=0, atol=0, equal_nan=True)


def test_without_labels_runs_are_called_as_their_folders(runs, into):
    assert ArtifactBuffer.merge(list(runs.values()), into).runs == ["run_0", "run_1", "run_2"]
    assert ArtifactBuffer.merge([f"{runs['seed 1']}/"], into.with_name("one")).runs == ["run_1"]


def test_merged_runs_can_be_merged_again(runs, into, tmp_path):
    first = list(runs)[:2]
    ArtifactBuffer.merge({label: runs[label] for label in first}, tmp_path / "inner")
    merged = ArtifactBuffer.merge({"old": tmp_path / "inner", "new": runs["seed 2"]}, into)
    assert merged.runs == ["old/seed 0", "old/seed 1", "new"]
    for label, path in zip(merged.runs, runs.values(), strict=True):
        check(merged["probe"].where(RUN, label), ArtifactBuffer.open(path)["probe"])
    assert [(event["run"], event["seed"]) for event in merged.events("mark")] == list(
        zip(merged.runs, range(3), strict=True)
    )


def test_labels_that_come_out_the_same_are_refused(runs, into, tmp_path):
    ArtifactBuffer.merge({"b/c": runs["seed 0"]}, tmp_path / "x")
    ArtifactBuffer.merge({"c": runs["seed 1"]}, tmp_path / "y")
    with pytest.raises(SettingsError, match="a/b/c"):
        ArtifactBuffer.merge({"a": tmp_path / "x", "a/b": tmp_path / "y"}, into)


def test_a_run_number_that_rows_hold_already_does_not_change_whose_they_are(runs, into, tmp_path):
    with ArtifactBuffer(tmp_path / "ranks") as buffer:
        for rank in (0, 1, 7):
            buffer.append("probe", {"x": float(rank)}, step=rank, run=rank)
    with ArtifactBuffer(tmp_path / "other") as buffer:
        buffer.append("probe", {"x": 5.0}, step=5)
    probe = ArtifactBuffer.merge([tmp_path / "ranks", tmp_path / "other"], into)["probe"]
    assert probe.where(RUN, "ranks")["x"].tolist() == [0, 1, 7]
    assert probe.where(RUN, "other")["x"].tolist() == [5]


def test_events_say_which_run_they_are_from(runs, into):
    merged = ArtifactBuffer.merge(runs, into)
    sources = [event for path in runs.values() for event in ArtifactBuffer.open(path).events()]
    expected = [{**event, "run": label} for event, label in zip(sources, runs, strict=True)]
    assert merged.events() == expected


def test_an_artifact_may_be_in_some_runs_only_and_have_any_number_of_rows(runs, into):
    for label, name, steps in (("seed 1", "late", range(4)), ("seed 2", "later", [3]), ("seed 0", "gone", [9])):
        with ArtifactBuffer(runs[label], resume=True) as buffer:
            for step in steps:
                buffer.append(name, {"x": float(step)}, step=step)
            buffer.truncate(8)
    merged = ArtifactBuffer.merge(runs, into)
    assert merged["late"].where(RUN, "seed 1")["x"].tolist() == [0, 1, 2, 3]
    assert len(merged["late"].where(RUN, "seed 0")) == 0
    assert merged["later"].to_pandas()["run"].tolist() == ["seed 2"]
    assert "gone" not in merged or len(merged["gone"]) == 0


def test_files_are_copied_with_their_rows(tmp_path, into):
    paths = [tmp_path / "a", tmp_path / "b"]
    for i, path in enumerate(paths):
        with ArtifactBuffer(path) as buffer:
            buffer.declare("fit", files=["dictionary"])
            for step in range(5):
                fit = {"atoms": torch.full((step, i + 1), float(step))}
                buffer.append("fit", {"dictionary": fit, "png": b"%d of %d" % (step, i), "x": step}, step=step)
    merged = ArtifactBuffer.merge(paths, into)
    for i, label in enumerate(merged.runs):
        rows = list(merged["fit"].where(RUN, label).unbind(0))
        assert [row["png"] for row in rows] == [b"%d of %d" % (step, i) for step in range(5)]
        for step, each in enumerate(rows):
            assert torch.equal(each["dictionary", "atoms"], torch.full((step, i + 1), float(step)))


R2 = {"r2": torch.ones(2)}
DIFFERENT = {
    "shape": ({"x": torch.ones(3)}, {"x": torch.ones(2)}, {}, {}, r"'x' is float32 of shape \(3,\).*shape \(2,\)"),
    "dtype": ({"x": torch.ones(3)}, {"x": torch.ones(3).double()}, {}, {}, "'x' is float32 .* float64"),
    "extra": ({"x": 1.0}, {"x": 1.0, ("n", "y"): 2.0}, {}, {}, r"\('n', 'y'\) is missing in one"),
    "missing": ({"x": 1.0, "y": 2.0}, {"x": 1.0}, {}, {}, "'y' is float32 .* missing in the other"),
    "files": ({"x": 1.0, "y": b"a"}, {"x": 1.0, "y": 2.0}, {}, {}, "'y' is kept in files in one and float32"),
    "dims": (R2, R2, {"dims": {"r2": "layer"}}, {"dims": {"r2": "unit"}}, "layer.*unit"),
    "coords": (R2, R2, {"coords": {"dim_0": [1, 2]}}, {"coords": {"dim_0": [1, 3]}}, r"coords differ: .*\[1, 3\]"),
    "settings": (R2, R2, {"settings": {"k": 1}}, {"settings": {"k": 2}}, "settings differ: 'k' is 2, expected 1"),
    "legend": (R2, R2, {"legend": {"r2": {1: "a"}}}, {"legend": {"r2": {1: "b"}}}, "legend differ"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_runs_that_differ_are_named_with_what_differs_and_nothing_is_left(tmp_path, into, what):
    one, other, first, second, text = DIFFERENT[what]
    for name, values, declared in (("a", one, first), ("b", other, second)):
        with ArtifactBuffer(tmp_path / name) as buffer:
            buffer.declare("probe", **declared)
            buffer.append("probe", values, step=0)
    with pytest.raises(SchemaError, match=f"'probe' differs between runs 'a' and 'b': .*{text}"):
        ArtifactBuffer.merge([tmp_path / "a", tmp_path / "b"], into)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_what_cannot_be_merged_is_refused_before_anything_is_made(runs, into, tmp_path):
    run = runs["seed 0"]
    for error, given, text in (
        (SettingsError, [run, tmp_path / "x" / ".." / "run_0"], "have the same label 'run_0'"),
        (SettingsError, [], "no run to merge"),
        (SettingsError, str(run), "is one folder"),
        (KeyMissingError, {"a": tmp_path / "run_7"}, "run_7 does not exist; there are runs in"),
    ):
        with pytest.raises(error, match=text):
            ArtifactBuffer.merge(given, into)
    assert not into.exists()


def stop_at(call, monkeypatch, action):
    calls, extend = [], ArtifactBuffer.extend

    def stop(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            action()
        return extend(self, *args, **kwargs)

    monkeypatch.setattr(ArtifactBuffer, "extend", stop)


@pytest.mark.parametrize("before", [False, True])
def test_a_merge_that_is_interrupted_leaves_all_as_it_was(runs, into, tmp_path, monkeypatch, before):
    if before:
        write(into, 9)
    stop_at(4, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        ArtifactBuffer.merge(runs, into, overwrite=before)
    assert not list(tmp_path.glob(".*"))
    assert into.exists() == before
    if before:
        assert ArtifactBuffer.open(into).events("mark")[0]["seed"] == 9
        assert len(ArtifactBuffer.open(into)["probe"]) == 8


def test_a_merge_that_is_killed_leaves_no_half_run_and_can_be_done_again(runs, into, forked, monkeypatch):
    stop_at(4, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert forked(lambda: ArtifactBuffer.merge(runs, into)) == ""
    monkeypatch.undo()
    assert not into.exists()
    assert len(ArtifactBuffer.merge(runs, into)["probe"]) == 21


def test_what_is_there_is_replaced_only_when_asked_and_other_files_never(runs, into, tmp_path):
    write(into, 9)
    with pytest.raises(RunExistsError, match="already holds a run"):
        ArtifactBuffer.merge(runs, into)
    assert ArtifactBuffer.open(into).events("mark")[0]["seed"] == 9
    assert len(ArtifactBuffer.merge(runs, into, overwrite=True)["probe"]) == 21
    again = {"all": into, **runs}
    assert len(ArtifactBuffer.merge(again, into, overwrite=True)["probe"]) == 42  # into one of its own sources
    for place in (into, tmp_path / "thesis"):
        place.mkdir(exist_ok=True)
        (place / "thesis.tex").write_text("x")
        with pytest.raises(RunExistsError, match=r"thesis\.tex"):
            ArtifactBuffer.merge(runs, place, overwrite=True)
        assert (place / "thesis.tex").read_text() == "x"
    assert len(ArtifactBuffer.open(into)["probe"]) == 42


def test_a_run_that_begins_there_in_the_meantime_is_left_alone(runs, into, monkeypatch):
    stop_at(2, monkeypatch, lambda: write(into, 9))
    with pytest.raises(RunExistsError, match="already holds a run"):
        ArtifactBuffer.merge(runs, into)
    assert ArtifactBuffer.open(into).events("mark")[0]["seed"] == 9


def test_a_run_that_another_process_writes_is_not_replaced(runs, into, forked):
    with ArtifactBuffer(into) as live:
        live.append("probe", row(9, 0), step=0)
        assert "is being written by process" in forked(lambda: ArtifactBuffer.merge(runs, into, overwrite=True))
        live.append("probe", row(9, 1), step=1)
    assert ArtifactBuffer.open(into)["probe"].steps.tolist() == [0, 1]


def test_a_run_without_its_manifest_is_merged_and_is_replaced(runs, into):
    (runs["seed 1"] / "manifest.json").unlink()
    with pytest.warns(DamagedWarning, match=r"manifest\.json is missing"):
        assert len(ArtifactBuffer.merge(runs, into)["probe"].where(RUN, "seed 1")) == 7
    (into / "manifest.json").unlink()
    with pytest.warns(DamagedWarning, match=r"manifest\.json is missing"):
        assert len(ArtifactBuffer.merge([runs["seed 0"]], into, overwrite=True)["probe"]) == 9


@pytest.mark.parametrize(
    ("file", "at", "cut"),
    [("000.x.column", 102, 0), ("000.x.column", 102, 1), ("commits", 6 * 96 + 20, 0), (f"{6:016x}.0.png", 0, 0)],
)
def test_what_is_whole_of_a_damaged_run_is_copied(tmp_path, into, file, at, cut):
    with ArtifactBuffer(tmp_path / "run") as buffer:
        for step in range(8):
            buffer.append("a", {"x": torch.full((5,), float(step)), "png": b"%d" % step}, step=step)
    damaged = tmp_path / "run" / "a" / file  # in row 5
    data = bytearray(damaged.read_bytes())
    data[at] ^= 1
    damaged.write_bytes(data[:at] if cut else data)
    with pytest.warns(DamagedWarning, match="damaged and left out"):
        merged = ArtifactBuffer.merge([tmp_path / "run"], into)["a"]
    whole = [0, 1, 2, 3, 4] if cut else [0, 1, 2, 3, 4, 6, 7]
    assert merged.steps.tolist() == merged.series("x")[:, 4].tolist() == whole
    assert merged.series("png") == [b"%d" % step for step in whole]


@pytest.mark.parametrize("live", [False, True])
def test_all_that_a_run_with_a_limit_holds_is_copied(tmp_path, into, monkeypatch, live):
    with ArtifactBuffer(tmp_path / "run", capacity=8) as buffer:
        for step in range(20):
            buffer.append("a", {"x": float(step)}, step=step)
        if live:  # a row comes and one goes with every third that is copied
            stop_at(2, monkeypatch, lambda: buffer.append("a", {"x": 20.0}, step=20))
        merged = ArtifactBuffer.merge([tmp_path / "run"], into)["a"]
        assert merged.steps.tolist()[:8] == list(range(12, 20))
