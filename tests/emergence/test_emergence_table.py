"""The table of a run: a row a series, and no onset for what never beats its null."""

import numpy as np
import pandas as pd
import pytest
import torch

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.emergence import change_points, emergence_table, half_maximum, sigmoid_onset
from tdhook_train.errors import KeyMissingError, SettingsError

STEPS = np.unique(np.geomspace(1, 10_001, 40).round() - 1).astype(int)
LAYERS, TARGETS = ["actor.0", "actor.2"], ["angle", "speed", "noise"]


def scores(rng, onsets=((100, 300, np.inf), (500, 1500, np.inf))):
    decades = np.log10(np.maximum(STEPS, 0.1))[:, None, None] - np.log10(np.array(onsets))
    clean = 0.1 + 0.8 / (1 + np.exp(np.clip(-decades / 0.1, -50, 50)))
    return clean + 0.01 * rng.standard_normal(clean.shape)


def write(path, r2, null=None, steps=STEPS, key="r2"):
    buffer = ArtifactBuffer(path)
    keys = [key] if null is None else [key, f"{key}_null"]
    dims = dict.fromkeys(keys, ("layer", "target"))
    buffer.declare("probe", dims=dims, coords={"layer": LAYERS, "target": TARGETS})
    for at, step in enumerate(steps):
        values = [r2[at]] if null is None else [r2[at], null[at]]
        buffer.append("probe", dict(zip(keys, map(torch.tensor, values), strict=True)), step=int(step))
    return buffer


@pytest.fixture
def planted(rng):
    r2 = scores(rng)
    null = np.full_like(r2, 0.15)
    null[:, 0, 1] = 0.95  # rises, but so does chance
    return r2, null


def test_a_row_a_series_with_the_numbers_of_the_functions(planted, tmp_path):
    r2, null = planted
    with write(tmp_path, r2, null) as buffer:
        table = emergence_table(buffer["probe"])
    assert list(zip(table.layer, table.target, strict=True)) == [(a, b) for a in LAYERS for b in TARGETS]
    assert list(table.columns) == [
        *("layer", "target", "onset_half", "onset_sigmoid", "low", "high", "start", "plateau", "beats_null"),
        *("change_points", "null", "reason", "reason_sigmoid"),
    ]
    found = table.set_index(["layer", "target"])
    for i, layer in enumerate(LAYERS):
        for j, target in enumerate(TARGETS):
            row, series = found.loc[layer, target], r2[:, i, j]
            half, fit = half_maximum(STEPS, series), sigmoid_onset(STEPS, series)
            assert row.start == pytest.approx(half.start)
            assert row.change_points == tuple(STEPS[change_points(series).points])
            if null[0, i, j] < 0.9 and target != "noise":
                assert row.onset_half == pytest.approx(half.onset)
                assert (row.onset_sigmoid, row.low, row.high) == pytest.approx((fit.onset, fit.low, fit.high), rel=1e-4)
                assert row.beats_null == STEPS[np.flatnonzero(series > 0.15)[0]]
                assert (row.null, row.reason, row.reason_sigmoid) == ("beaten", "", "")
    assert found.onset_half["actor.0", "angle"] == pytest.approx(100, rel=0.1)
    assert found.onset_half["actor.2", "speed"] == pytest.approx(1500, rel=0.1)


def test_what_never_beats_its_null_has_no_onset(planted, tmp_path):
    r2, null = planted
    assert half_maximum(STEPS, r2[:, 0, 1]).reason == ""  # it would have one
    with write(tmp_path, r2, null) as buffer:
        table = emergence_table(buffer["probe"]).set_index(["layer", "target"])
        free = emergence_table(buffer["probe"], null=None).set_index(["layer", "target"])
    never = [("actor.0", "speed"), ("actor.0", "noise"), ("actor.2", "noise")]
    rows = table.loc[never]
    assert (rows.reason == "never beats its null").all()
    assert (rows.reason_sigmoid == "never beats its null").all()
    assert (rows.null == "not beaten").all()
    assert rows[["onset_half", "onset_sigmoid", "low", "high", "beats_null"]].isna().all(axis=None)
    assert table.drop(never).reason.eq("").all()
    assert free.onset_half["actor.0", "speed"] == pytest.approx(300, rel=0.1)
    assert (free.null == "none").all()


@pytest.mark.parametrize(("run", "ticks", "beaten"), [(2, None, False), (3, None, True), (1, 2, False), (2, 2, True)])
def test_the_null_is_beaten_by_ticks_running(run, ticks, beaten, rng, tmp_path):
    r2 = scores(rng)
    assert 20 < len(STEPS) <= 400  # three by default
    null = np.ones_like(r2)
    null[10 : 10 + run, 0, 0] = 0
    null[20 : 20 + run + 1 : run + 1, 0, 0] = 0  # apart: not running
    with write(tmp_path, r2, null) as buffer:
        row = emergence_table(buffer["probe"], ticks=ticks).iloc[0]
    assert (row.null == "beaten") == beaten
    assert row.beats_null == STEPS[10] if beaten else np.isnan(row.beats_null)


def test_ticks_without_score_or_null_are_left_out(planted, tmp_path):
    r2, null = planted
    null[1::2] = np.nan
    null[:, 1, 1] = np.nan
    r2[5:9, 0, 0] = np.nan
    r2[:, 0, 2] = np.nan
    with write(tmp_path, r2, null) as buffer:
        table = emergence_table(buffer["probe"]).set_index(["layer", "target"])
    assert table.onset_half["actor.0", "angle"] == pytest.approx(100, rel=0.15)
    assert table.null["actor.0", "angle"] == "beaten"
    assert table.null["actor.0", "speed"] == "not beaten"
    # no null at all: it is said, and the onset stays
    assert table.null["actor.2", "speed"] == "none"
    assert table.onset_half["actor.2", "speed"] == pytest.approx(1500, rel=0.1)
    assert table.reason["actor.0", "noise"] == "no finite value"


def test_an_r2_below_0_is_nothing_whatever_the_null(planted, tmp_path):
    r2, null = planted[0] - 1, planted[1] - 1
    with write(tmp_path / "a", r2, null) as one, write(tmp_path / "b", r2, null, key="margin") as other:
        assert (emergence_table(one["probe"]).null == "not beaten").all()
        table = emergence_table(other["probe"], "margin")
    assert (table.null == "beaten").tolist() == [True, False, False, True, True, False]


def test_a_loss_falls(planted, tmp_path):
    r2, null = planted
    with write(tmp_path / "a", r2, null) as one, write(tmp_path / "b", 1 - r2, 1 - null, key="log_loss") as other:
        risen = emergence_table(one["probe"])
        fallen = emergence_table(other["probe"], "log_loss", direction="fall")
    numbers = ["onset_half", "onset_sigmoid", "beats_null"]
    pd.testing.assert_frame_equal(risen[numbers], fallen[numbers], rtol=1e-5)
    assert fallen.plateau[0] == pytest.approx(0.1, abs=0.02)


def test_several_runs_by_name_and_merged(planted, tmp_path, rng):
    r2, null = planted
    later = scores(rng, ((200, 600, np.inf), (900, 2500, np.inf)))
    for seed, values in enumerate((r2, later)):
        write(tmp_path / str(seed), values, null).close()
    runs = {seed: ArtifactBuffer.open(tmp_path / str(seed)) for seed in range(2)}
    named = emergence_table({seed: run["probe"] for seed, run in runs.items()})
    assert named.run.tolist() == [0] * 6 + [1] * 6
    assert named.onset_half[named.target == "angle"].tolist() == pytest.approx([100, 500, 200, 900], rel=0.1)
    with ArtifactBuffer.merge({s: tmp_path / str(s) for s in range(2)}, into=tmp_path / "merged") as merged:
        table = emergence_table(merged["probe"])
    assert table.run.tolist() == ["0"] * 6 + ["1"] * 6
    pd.testing.assert_frame_equal(table.drop(columns="run"), named.drop(columns="run"))
    for run in runs.values():
        run.close()


def test_of_rows_of_one_step_the_last_counts(planted, tmp_path):
    r2, null = planted
    steps = np.repeat(STEPS, 2)
    twice = np.repeat(r2, 2, axis=0)
    twice[::2] = 7.0
    with (
        write(tmp_path / "a", r2, null) as once,
        write(tmp_path / "b", twice, np.repeat(null, 2, axis=0), steps) as two,
    ):
        pd.testing.assert_frame_equal(emergence_table(once["probe"]), emergence_table(two["probe"]))


@pytest.mark.parametrize("rows", [1, 2])
def test_one_tick_and_two(rows, planted, tmp_path):
    r2, null = planted
    with write(tmp_path, r2[:rows], null[:rows], STEPS[:rows]) as buffer:
        table = emergence_table(buffer["probe"])
    assert table.onset_half.isna().all()
    assert table.change_points.map(len).eq(0).all()


def test_other_dimensions_and_none(tmp_path):
    with ArtifactBuffer(tmp_path) as buffer:
        buffer.declare("health", dims={"dormant": ("layer", "tau", "unit")})
        for step in STEPS:
            row = {"dormant": torch.full((1, 2, 2), float(step > 99)), "loss": torch.tensor(float(step > 99))}
            buffer.append("health", row, step=int(step))
        table = emergence_table(buffer["health"], "dormant")
        single = emergence_table(buffer["health"], "loss")
    assert table[["layer", "tau", "unit"]].to_numpy().tolist() == [[0, i, j] for i in range(2) for j in range(2)]
    assert len(single) == 1
    assert 80 < single.onset_half[0] < 130
    assert single.onset_half[0] == table.onset_half[3]


def test_mistakes_are_named(planted, tmp_path):
    r2, null = planted
    with write(tmp_path, r2, null) as buffer:
        for arguments, error, text in [
            ({"key": "r3"}, KeyMissingError, "did you mean 'r2'"),
            ({"null": "nul"}, KeyMissingError, "has no key 'nul'"),
            ({"null": ("meta", "time")}, SettingsError, "has shape"),
            ({"direction": "up"}, SettingsError, "did you mean 'rise'"),
            ({"ticks": 0}, SettingsError, "ticks=0"),
            ({"level": 2}, SettingsError, "level=2"),
        ]:
            with pytest.raises(error, match=text):
                emergence_table(buffer["probe"], **arguments)
    with pytest.raises(SettingsError, match="there is no run"):
        emergence_table({})
