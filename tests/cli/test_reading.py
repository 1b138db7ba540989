"""`ls`, `show`, `export`, `watch`: what a run holds, from another terminal."""

import subprocess

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from small_runs import COMMAND, process, record

from tdhook_train import ArtifactBuffer
from tdhook_train.buffer.lock import writer_of
from tdhook_train.cli.watch import states


def table(text, lines=slice(1, None)):
    return [line.split() for line in text.splitlines()[lines]]


def test_ls_shows_rows_steps_dims_settings_and_events(cli, run):
    done = cli("ls", run)
    assert done.code == 0
    lines = done.out.splitlines()
    probe = next(line for line in lines if line.startswith("probe"))
    assert probe.split()[1:3] == ["3", "0…4"]
    assert "layer=3 target=2" in probe
    assert 'RidgeProbe layers="**"' in probe
    assert "events: 1 mark" in lines
    assert "\x1b" not in done.out


def test_ls_of_errors_and_skips_says_which(cli, tmp_path):
    with ArtifactBuffer(tmp_path / "r") as buffer:
        buffer.append("a", {"x": 1.0}, step=3)
        buffer.note("skip", step=7, frames=0, why="budget", detail="took 3 s")
        buffer.note("error", step=-1, row="a", path="c.pt", error="CheckpointError: \x1b[31mcut short")
    done = cli("ls", tmp_path)  # the folder around the run
    assert "skip at step 7: budget · took 3 s" in done.out
    assert "error: a · c.pt · CheckpointError: �[31mcut short" in done.out  # nothing moves the terminal


def test_show_is_the_series_steps_by_layers_for_a_target(cli, run):
    done = cli("show", run, "probe/r2", "--target", "z")
    with ArtifactBuffer.open(run) as buffer:
        expected = buffer["probe"].series("r2")[:, :, 1]
    rows = table(done.out)
    assert rows[0] == ["step", "0", "1", "2"]
    assert [int(row[0]) for row in rows[1:]] == [0, 2, 4]
    np.testing.assert_allclose([list(map(float, row[1:])) for row in rows[1:]], expected.numpy(), atol=5e-4)


def test_show_of_a_layer_has_a_column_a_target(cli, run):
    done = cli("show", run, "probe/r2", "--layer", "2", "--last", "1")
    with ArtifactBuffer.open(run) as buffer:
        expected = buffer["probe"].series("r2")[-1, 2]
    head, row = table(done.out)
    assert head == ["step", "y", "z"]
    np.testing.assert_allclose([float(cell) for cell in row[1:]], expected.numpy(), atol=5e-4)


def test_show_of_both_is_one_value_a_step_and_without_either_the_first_target(cli, run):
    both = table(cli("show", run, "probe/r2", "--layer", "2", "--target", "y").out)
    first = cli("show", run, "probe/r2").out
    assert both[0] == ["step", "value"]
    assert "target y (of 2; --target takes z)" in first
    assert [row[1] for row in both[1:]] == [row[3] for row in table(first)[1:]]


def test_show_averages_the_batch(cli, run):
    with ArtifactBuffer.open(run) as buffer:
        expected = buffer["look"].series(("attr", "input")).double().mean(1).numpy()
    done = cli("show", run, "look/attr.input")
    assert "mean over 5 rows of the batch" in done.out
    shown = [list(map(float, row[1:])) for row in table(done.out)[1:]]
    np.testing.assert_allclose(shown, expected, atol=5e-4)


def test_show_explains_codes_and_takes_any_dimension(cli, run):
    done = cli("show", run, "probe/null_reason")
    assert "2: rows are not whole trajectories in time order" in done.out
    at = cli("show", run, "health/dormant", "--at", "tau=0.1")
    assert at.code == 0, at.err
    assert "tau 0.1" in at.out


def test_show_without_a_key_lists_the_keys(cli, run):
    assert ["probe/r2", "float64", "layer=3", "target=2"] in table(cli("show", run).out)
    assert not any(row[0].startswith("health") for row in table(cli("show", run, "probe").out))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["prob/r2"], "did you mean 'probe'?"),
        (["r2"], "did you mean 'probe/r2'?"),
        (["probe/r3"], "did you mean 'r2'?"),
        (["probe/r2", "--target", "yy"], "has no target 'yy'"),
        (["health/dormant", "--target", "y"], "has no dimension 'target'"),
        (["probe/r2", "--at", "target"], "not of the form DIM=LABEL"),
        (["probe/r2", "--last", "0"], "--last"),
    ],
)
def test_what_show_does_not_know_is_one_line(cli, run, args, said):
    done = cli("show", run, *args)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_merged_runs_have_a_column_of_their_own(cli, run, tmp_path):
    ArtifactBuffer.merge({"a": run, "b": run}, tmp_path / "both", progress=False)
    rows = table(cli("show", tmp_path / "both", "probe/meta.step").out)
    assert rows[0] == ["run", "step", "value"]
    assert sorted(row[0] for row in rows[1:]) == ["a", "a", "a", "b", "b", "b"]


def test_parquet_is_what_the_buffer_holds(cli, run, tmp_path):
    done = cli("export", run, "--to", "parquet", "--key", "probe/r2", "--key", "health", "--out", tmp_path)
    assert done.out.splitlines() == [str(tmp_path / "probe.r2.parquet"), str(tmp_path / "health.parquet")]
    with ArtifactBuffer.open(run) as buffer:
        pd.testing.assert_frame_equal(
            pd.read_parquet(tmp_path / "probe.r2.parquet"), buffer["probe"].to_pandas("r2"), check_dtype=False
        )


def test_csv_has_a_line_a_number(cli, run, tmp_path):
    cli("export", run, "--to", "csv", "--out", tmp_path)
    read = pd.read_csv(tmp_path / "probe.r2.csv")
    assert list(read) == ["step", "layer", "target", "value"]
    with ArtifactBuffer.open(run) as buffer:
        np.testing.assert_array_equal(read["value"], buffer["probe"].series("r2").numpy().ravel())
    assert pd.read_csv(tmp_path / "probe.csv")["step"].tolist() == [0, 2, 4]


def test_netcdf_comes_back_with_labels(cli, run, tmp_path):
    done = cli("export", run, "--to", "netcdf", "--out", tmp_path)
    assert done.code == 0, done.err
    with xr.open_dataset(tmp_path / "probe.nc") as read, ArtifactBuffer.open(run) as buffer:
        probe = buffer["probe"]
        np.testing.assert_array_equal(read["r2"], probe.series("r2"))
        assert read["target"].values.tolist() == ["y", "z"]
        assert read["step"].values.tolist() == [0, 2, 4]
        assert int(read["weights"].values[0], 16) == int(probe.series(("meta", "weights"))[0]) % 2**64


def test_numbers_that_netcdf_has_no_room_for_keep_their_value(cli, tmp_path):
    import torch

    with ArtifactBuffer(tmp_path / "r") as buffer:
        row = {
            "z": torch.tensor([1 + 2j]),
            "h": torch.tensor(0.5, dtype=torch.float16),
            "u": torch.tensor([200]).byte(),
        }
        buffer.append("a", row | {"b": torch.tensor(True), "n": torch.tensor(2**40)}, step=2**33)
    done = cli("export", tmp_path / "r", "--to", "netcdf", "--out", tmp_path)
    assert done.code == 0, done.err
    with xr.open_dataset(tmp_path / "a.nc") as read:
        assert (read["z.real"].item(), read["z.imag"].item(), read["h"].item(), read["u"].item()) == (1, 2, 0.5, 200)
        assert (read["b"].item(), read["n"].item(), read["step"].item()) == (1, 2**40, 2**33)


def test_without_a_library_for_netcdf_the_install_line_is_given(cli, run, tmp_path, monkeypatch):
    monkeypatch.setattr("tdhook_train.buffer.netcdf.importlib.util.find_spec", lambda _: None)
    done = cli("export", run, "--to", "netcdf", "--out", tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert 'pip install "tdhook-train[tables]"' in done.err


def test_watch_once_shows_where_each_key_is(cli, run):
    done = cli("watch", run, "--once")
    with ArtifactBuffer.open(run) as buffer:
        means = buffer["health"].series("dormant").double().mean((1, 2))
    row = next(row for row in table(done.out) if row[0] == "health/dormant")
    assert row[1:3] == ["3", "4"]
    assert [float(cell) for cell in row[3:5]] == pytest.approx([means[0].item(), means[-1].item()], rel=1e-3)


def test_watch_follows_a_writer_and_ends_after_it(tmp_path):
    with ArtifactBuffer(tmp_path / "r") as buffer, ArtifactBuffer.open(tmp_path / "r") as reader:
        buffer.append("a", {"x": 1.0}, step=1)
        over, waited = [False, False, True], []

        def wait(seconds):
            waited.append(seconds)
            buffer.append("a", {"x": 1.0 + len(waited)}, step=1 + len(waited))

        tables = [one.plain() for one in states(reader, 0.5, lambda _: over.pop(0), wait)]
    assert waited == [0.5, 0.5]
    assert [table(text)[0][1:5] for text in tables] == [
        ["1", "1", "1", "1"],
        ["2", "2", "1", "2"],
        ["3", "3", "1", "3"],
    ]


def test_a_run_has_a_writer_as_long_as_its_process_has_it_open(tmp_path):
    import os

    with ArtifactBuffer(tmp_path / "r"):
        assert writer_of(tmp_path / "r") == os.getpid()
    if os.path.exists("/proc/self/fd"):
        assert writer_of(tmp_path / "r") is None  # though this process lives on
    assert writer_of(tmp_path) is None


def test_watch_ends_by_itself_when_the_run_is_over(run):
    done = process("watch", run, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("probe/r2 ") == 1  # a pipe is told once of what stays the same
    assert "\x1b" not in done.stdout


def test_a_reader_that_leaves_early_is_no_error(run, tmp_path):
    record(tmp_path / "long", steps=40)
    command = " ".join([*COMMAND, "show", str(tmp_path / "long"), "probe/r2"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; ({command}; echo $? >&2) | true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip() == "141"
