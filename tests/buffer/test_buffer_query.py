"""Questions are answered in step order, by labels, from copies."""

import importlib

import numpy as np
import pytest
import torch

from tdhook_train.errors import KeyMissingError, MissingPackageError, SettingsError

STEPS = [30, 10, 20, 10, 50, 40]  # written out of order, step 10 twice


@pytest.fixture
def artifact(buffer):
    buffer.declare(
        "probe",
        dims={("net", "r2"): ("layer", "target"), "h": ("unit",)},
        coords={"layer": ["actor.0", "actor.2"], "target": ["x", "y", "z"]},
        settings={"alpha": 1.0},
        legend={"why": {1: "few rows"}},
    )
    for place, step in enumerate(STEPS):
        row = {
            ("net", "r2"): torch.arange(6.0).reshape(2, 3) + 100 * place,
            "h": torch.full((4,), place, dtype=torch.bfloat16),
            "why": torch.tensor(place, dtype=torch.int8),
        }
        buffer.append("probe", row, step=step, frames=step * 7, cost=step / 10)
    return buffer["probe"]


ORDER = [1, 3, 2, 0, 5, 4]  # places of the rows in step order, ties as written


def places(rows):
    return rows["why"].tolist()


def test_steps_are_in_order_whatever_the_order_of_writing(artifact):
    assert artifact.steps.tolist() == sorted(STEPS)
    assert artifact.steps.dtype == torch.int64


def test_series_follows_the_steps(artifact):
    assert artifact.series("why").tolist() == ORDER
    assert torch.equal(artifact.series(("net", "r2"))[:, 1, 2], torch.tensor(ORDER) * 100.0 + 5)
    assert torch.equal(artifact.series(("meta", "frames")), artifact.steps * 7)
    assert torch.equal(artifact.series(("meta", "cost")), artifact.steps / 10.0)


def test_a_series_reads_its_column_alone(artifact, monkeypatch):
    disk = artifact.storage.disk
    for key, column in zip(disk._keys, disk._columns, strict=True):
        if key != ("why",):
            monkeypatch.setattr(column, "rows", None)
    assert len(artifact.series("why")) == len(artifact)
    assert len(artifact.between(keys=["why"])) == len(artifact)
    with pytest.raises(TypeError):
        artifact.between()


def test_at_gives_the_last_row_written_of_a_step(artifact):
    row = artifact.at(10)
    assert row.batch_size == ()
    assert int(row["why"]) == 3
    assert int(row["meta", "step"]) == 10


@pytest.mark.parametrize(("step", "near"), [(25, "20 and 30"), (5, "10"), (60, "50")])
def test_at_names_the_nearest_steps(artifact, step, near):
    with pytest.raises(KeyMissingError, match=f"no row of step {step}; the nearest are {near}"):
        artifact.at(step)


@pytest.mark.parametrize("lo", [None, 5, 10, 15, 20, 50, 55])
@pytest.mark.parametrize("hi", [None, 5, 10, 15, 40, 50, 55])
def test_between_holds_both_bounds(artifact, lo, hi):
    low, high = -np.inf if lo is None else lo, np.inf if hi is None else hi
    assert places(artifact.between(lo, hi)) == [place for place in ORDER if low <= STEPS[place] <= high]


@pytest.mark.parametrize("n", [0, 1, 4, 6, 9])
def test_first_and_last_are_in_step_order(artifact, n):
    assert places(artifact.first(n)) == ORDER[:n]
    assert places(artifact.last(n)) == ORDER[max(0, 6 - n) :]
    assert artifact.last(n).batch_size == (min(n, 6),)


def test_a_negative_number_of_rows_is_refused(artifact):
    with pytest.raises(SettingsError, match="n=-1"):
        artifact.last(-1)


@pytest.mark.parametrize(
    ("key", "hint"), [("whi", "did you mean 'why'"), (("net", "r3"), "did you mean 'net.r2'"), ("r2", "'net.r2'")]
)
def test_a_key_that_is_not_there_names_the_nearest(artifact, key, hint):
    for ask in (artifact.series, artifact.dims, artifact.to_pandas):
        with pytest.raises(KeyMissingError, match=hint):
            ask(key)


def test_answers_are_copies(artifact):
    for rows in (artifact.at(10), artifact.first(2), artifact.between(), artifact[:], artifact[0], artifact[[0, 1]]):
        rows["why"].fill_(77)
    artifact.series("why").fill_(77)
    artifact.steps.fill_(77)
    artifact["why"].fill_(77)
    assert artifact.series("why").tolist() == ORDER
    assert artifact.steps.tolist() == sorted(STEPS)


def test_dims_coords_legend_and_settings(artifact):
    assert artifact.dims(("net", "r2")) == ("layer", "target")
    assert artifact.dims("why") == ()
    assert artifact.coords == {"layer": ["actor.0", "actor.2"], "target": ["x", "y", "z"], "unit": [0, 1, 2, 3]}
    assert artifact.legend == {"why": {1: "few rows"}}
    assert artifact.settings == {"alpha": 1.0}


def test_a_tidy_table_has_one_line_a_number(artifact):
    table = artifact.to_pandas(("net", "r2"))
    assert list(table) == ["step", "layer", "target", "value"]
    assert len(table) == 6 * 2 * 3
    values = artifact.series(("net", "r2"))
    for line, (row, layer, target) in enumerate(np.ndindex(6, 2, 3)):
        got = table.iloc[line].tolist()
        labels = [sorted(STEPS)[row], ["actor.0", "actor.2"][layer], "xyz"[target]]
        assert got == [*labels, float(values[row, layer, target])]


def test_a_tidy_table_of_a_scalar_and_of_bfloat16(artifact):
    assert artifact.to_pandas("why")["value"].tolist() == ORDER
    assert artifact.to_pandas("h")["value"].tolist() == [place for place in ORDER for _ in range(4)]


def test_the_table_of_rows_has_meta_and_scalars(artifact):
    table = artifact.to_pandas()
    assert list(table) == ["step", "frames", "epoch", "weights", "data", "attempt", "time", "cost", "why"]
    assert table["step"].tolist() == sorted(STEPS)
    assert table["why"].tolist() == ORDER


def test_a_scalar_named_like_meta_keeps_its_column(buffer):
    buffer.append("a", {"cost": 5.0}, step=1, cost=0.5)
    table = buffer["a"].to_pandas()
    assert (table["cost"].item(), table["artifact.cost"].item()) == (0.5, 5.0)
    assert buffer["a"].to_xarray()["artifact.cost"].item() == 5.0


def test_xarray_is_labelled(artifact):
    data = artifact.to_xarray()
    assert data["net.r2"].dims == ("step", "layer", "target")
    assert data["step"].values.tolist() == sorted(STEPS)
    assert data["net.r2"].sel(step=40, layer="actor.2", target="y").item() == 504.0
    assert data["frames"].sel(step=50).item() == 350
    assert '"alpha": 1.0' in data.attrs["settings"]


def test_xarray_tells_dimensions_of_unlike_size_apart(buffer):
    buffer.declare("a", dims={("actor", "h"): ("unit",), ("critic", "h"): ("unit",)})
    buffer.append("a", {("actor", "h"): torch.ones(2), ("critic", "h"): torch.ones(3)}, step=0)
    data = buffer["a"].to_xarray()
    assert data["actor.h"].dims == ("step", "actor.h.unit")
    assert data["critic.h"].shape == (1, 3)
    assert buffer["a"].coords == {"unit": [0, 1, 2]}


@pytest.mark.parametrize(("package", "ask"), [("pandas", "to_pandas"), ("xarray", "to_xarray")])
def test_a_package_that_is_not_installed_is_named_with_its_install_line(artifact, monkeypatch, package, ask):
    real = importlib.import_module

    def missing(name, *args):
        if name == package:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingPackageError, match=r'pip install "tdhook-train\[tables\]"'):
        getattr(artifact, ask)()


def test_an_artifact_without_rows_answers_with_none(buffer, fill):
    fill(buffer, [5])
    buffer.truncate(0)
    artifact = buffer["probe"]
    assert artifact.steps.tolist() == []
    assert artifact.series("attr").shape == (0, 4, 50)
    assert artifact.last(3).batch_size == (0,)
    assert len(artifact.to_pandas()) == 0
    with pytest.raises(KeyMissingError, match="has no rows yet"):
        artifact.at(5)
