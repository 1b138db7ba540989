"""A row that differs is refused whole; what describes an artifact survives and is compared."""

import json

import pytest
import torch

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.buffer.schema import Declaration, Schema
from tdhook_train.errors import SchemaError, SettingsError

GOOD = {"x": torch.ones(2), ("net", "y"): torch.ones(3, dtype=torch.int64)}
BAD = [
    pytest.param({"x": torch.ones(2)}, r"key \('net', 'y'\) is missing", id="missing"),
    pytest.param(GOOD | {"xs": torch.ones(1)}, r"key 'xs' is extra; did you mean 'x'", id="extra"),
    pytest.param(GOOD | {"x": torch.ones(3)}, r"key 'x' has shape \(3,\), expected \(2,\)", id="shape"),
    pytest.param(GOOD | {"x": torch.ones(())}, r"key 'x' has shape \(\), expected \(2,\)", id="scalar"),
    pytest.param(
        GOOD | {"x": torch.ones(2, dtype=torch.float64)}, "key 'x' has dtype torch.float64, expected torch.float32",
        id="dtype",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD)
def test_append_refuses_a_row_that_differs_and_takes_no_place_for_it(buffer, row, message):
    buffer.append("a", GOOD, step=0)
    with pytest.raises(SchemaError, match="a: " + message):
        buffer.append("a", row, step=1)
    assert len(buffer["a"]) == 1
    assert buffer.append("a", GOOD, step=1) == 1
    assert torch.equal(buffer["a"].series("x"), torch.ones(2, 2))


@pytest.mark.parametrize("write", ["extend", "add"])
@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype", "no meta"])
def test_extend_and_add_refuse_as_append_does(buffer, write, change):
    buffer.append("a", GOOD, step=0)
    artifact = buffer["a"]
    row = artifact[:]
    if change == "missing":
        del row["x"]
    elif change == "no meta":
        del row["meta"]
    else:
        wrong = {
            "extra": ("z", torch.ones(1)),
            "shape": ("x", torch.ones(1, 4)),
            "dtype": ("x", torch.ones(1, 2).int()),
        }
        row[wrong[change][0]] = wrong[change][1]
    with pytest.raises(SchemaError, match="a: key"):
        getattr(artifact, write)(row if write == "extend" else row[0])
    assert len(artifact) == 1
    assert buffer.append("a", GOOD, step=1) == 1


def test_extend_and_add_write_whole_rows(buffer):
    for step in range(3):
        buffer.append("a", {"x": torch.full((2,), float(step))}, step=step)
    artifact = buffer["a"]
    rows = artifact[:]
    keys = set(rows.keys(True, True))
    rows["meta", "step"] += 3
    assert artifact.extend(rows).tolist() == [3, 4, 5]
    rows["meta", "step"] += 3
    assert artifact.add(rows[1]) == 6
    assert artifact.steps.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert artifact.series("x")[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 1]
    assert set(rows.keys(True, True)) == keys


def test_a_first_row_that_breaks_its_declaration_is_refused(buffer):
    buffer.declare("a", dims={"x": ("layer",)}, coords={"layer": ["l1", "l2", "l3"]})
    with pytest.raises(SchemaError, match="2 entries along 'layer', expected 3"):
        buffer.append("a", {"x": torch.ones(2)}, step=0)
    with pytest.raises(SchemaError, match="do not fit"):
        buffer.append("a", {"x": torch.ones(3, 1)}, step=0)
    with pytest.raises(SchemaError, match="'x' was declared, but the first row has none"):
        buffer.append("a", {"y": torch.ones(3)}, step=0)
    assert len(buffer) == 0
    buffer.append("a", {"x": torch.ones(3)}, step=0)
    assert buffer["a"].dims("x") == ("layer",)


@pytest.mark.parametrize(
    "declaration",
    [
        {"dims": {"x": ("step",)}},
        {"dims": {"x": ("a", "a")}},
        {"dims": {"x": ("*a", "b")}},
        {"dims": {}, "settings": {"f": object()}},
    ],
)
def test_a_declaration_that_cannot_be_kept_is_refused(buffer, declaration):
    with pytest.raises(SettingsError):
        buffer.declare("a", **declaration)


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "a b", ".a", "é", "manifest.json", 3])
def test_names_that_are_no_folder_are_refused(buffer, name):
    with pytest.raises(SettingsError):
        buffer.append(name, {"x": 1}, step=0)


def test_dims_are_inferred_named_or_expanded(buffer):
    buffer.declare("a", dims={"x": "batch *unit", "y": ("batch", "*unit"), "z": ("*unit",)})
    buffer.append("a", {"x": torch.ones(2, 3), "y": torch.ones(2, 3, 4), "z": 1.0, "w": torch.ones(5, 6)}, step=0)
    artifact = buffer["a"]
    assert [artifact.dims(key) for key in "xyzw"] == [
        ("batch", "unit"), ("batch", "unit_0", "unit_1"), (), ("dim_0", "dim_1")
    ]  # fmt: skip


def describe(buffer, **changes):
    given = {
        "dims": {("net", "r2"): ("layer", "target")},
        "coords": {"layer": ["a", "b"], "target": [1, 2, 3]},
        "settings": {"alpha": 0.1, "nan": float("nan"), "path": "x", "f": torch.relu, "dtype": torch.float32},
        "legend": {("net", "r2"): {1: "too few rows", -2: "constant"}},
    }
    buffer.declare("a", **(given | changes))


def test_what_was_declared_is_there_when_the_run_is_opened_again(path):
    with ArtifactBuffer(path) as buffer:
        describe(buffer)
        buffer.append("a", {("net", "r2"): torch.ones(2, 3)}, step=0)
    artifact = ArtifactBuffer.open(path)["a"]
    assert artifact.dims(("net", "r2")) == ("layer", "target")
    assert artifact.coords == {"layer": ["a", "b"], "target": [1, 2, 3]}
    assert artifact.legend == {("net", "r2"): {1: "too few rows", -2: "constant"}}
    assert artifact.settings["alpha"] == 0.1
    assert "relu" in artifact.settings["f"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"alpha": 0.2}}, "settings differ: 'alpha' is 0.2, expected 0.1"),
        ({"coords": {"layer": ["a", "c"]}}, "coords differ: 'layer'"),
        ({"dims": {("net", "r2"): ("layer", "unit")}}, "dims of .* are .*unit.*, expected .*target"),
        ({"dims": {"r3": ("layer",)}}, "'r3' is declared, but not among"),
        ({"legend": {}}, "legend differ"),
    ],
)
def test_a_resumed_run_refuses_another_declaration_and_takes_the_same(path, changes, message):
    with ArtifactBuffer(path) as buffer:
        describe(buffer)
        buffer.append("a", {("net", "r2"): torch.ones(2, 3)}, step=0)
    with ArtifactBuffer(path, resume=True) as buffer:
        describe(buffer)
        with pytest.raises(SchemaError, match=message):
            describe(buffer, **changes)


def test_a_schema_comes_back_from_plain_json():
    row = {("a", "b.c"): torch.ones(2, 3, dtype=torch.bfloat16), ("d",): torch.ones((), dtype=torch.bool)}
    declared = Declaration.of({("a", "b.c"): "x y"}, {"x": [1.5, "two"]}, {"k": [1]}, {"d": {1: "why"}})
    schema = Schema.of(row, declared)
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
