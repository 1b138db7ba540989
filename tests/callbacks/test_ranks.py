"""Two processes give the rows of one and know the same, an error of one is everybody's, and nobody waits for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import on_ranks
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from small import rows, same

from tdhook_train import ArtifactBuffer, At, Every, Geometric, When
from tdhook_train.callbacks.ranks import refuse_sharded

FAILING = ["raise", "behind", "trigger", "strange", "unlike", "nowhere"]


def run(folder: Path, strategy: str, *names: str) -> subprocess.CompletedProcess[str]:
    """Run a script whose processes all hold its pipes: this returns when the last of them has ended."""
    command = [sys.executable, on_ranks.__file__, str(folder), "2", strategy, *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def steps(path: Path, row: str) -> list[int]:
    with ArtifactBuffer.open(path) as buffer:
        return buffer[row].steps.tolist()


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> Any:
    """What two processes found, by scenario and rank, and below which folder."""
    folder = tmp_path_factory.mktemp("two")
    done = run(folder, "ddp", *on_ranks.SCENARIOS)
    assert done.returncode == 0, done.stderr

    def found(name: str, rank: int = 0) -> Any:
        return torch.load(folder / f"{name}-{rank}.pt", weights_only=False)

    found.folder = folder
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["batch", "thirds", "each", "given", "averaged", "validated", "recycled", "timed", "followed", "asked"]
)
def test_two_processes_give_the_rows_of_one_bit_by_bit(name, two, tmp_path):
    one, found = on_ranks.SCENARIOS[name](tmp_path), two(name)
    assert rows(tmp_path / "run") == rows(two.folder / name / "run")
    assert same(one["weights"], found["weights"])
    assert same(one["moments"], found["moments"])
    assert one["metrics"] == found["metrics"]


@pytest.mark.slow
def test_a_fit_in_two_processes_ends_in_the_same_bits_as_without(two):
    for rank in (0, 1):
        bare = two("bare", rank)
        for name in ("batch", "thirds", "given", "timed", "asked", "warn", "thrifty"):
            found = two(name, rank)
            assert all(same(found[what], bare[what]) for what in ("weights", "moments", "rng", "hooks", "step")), name


@pytest.mark.slow
def test_both_processes_end_with_the_same_weights_and_know_the_same(two):
    for name in sorted(set(on_ranks.SCENARIOS) - set(FAILING) - {"resumed", "span", "sharded"}):
        first, second = two(name, 0), two(name, 1)
        assert same(first["weights"], second["weights"]), name
        assert same(first["moments"], second["moments"]), name
        assert first["metrics"] == second["metrics"], name
        assert first["hooks"] == second["hooks"] == 0, name


@pytest.mark.slow
def test_checkpoints_and_early_stopping_go_by_what_was_measured(two):
    first, second = two("monitored", 0), two("monitored", 1)
    assert first["step"] == second["step"] == 8  # the second epoch is the first that is no better by 100
    assert first["stopped"] == second["stopped"] == 1
    assert (first["best"], first["score"]) == (second["best"], second["score"])
    with ArtifactBuffer.open(two.folder / "monitored" / "tdhook" / "observer") as buffer:
        ranks = dict(zip(buffer["rank"].steps.tolist(), buffer["rank"].series("effective_rank").mean(1), strict=True))
    best = max((step for step in ranks if step), key=lambda step: float(ranks[step]))
    assert Path(first["best"]).name == f"step={best}.ckpt"
    assert first["score"] == pytest.approx(float(ranks[best]))


@pytest.mark.slow
def test_two_processes_go_on_in_the_middle_of_an_epoch(two):
    folder = two.folder / "resumed"
    assert rows(folder / "whole", "attempt") == rows(folder / "run", "attempt")
    assert steps(folder / "run", "rank") == [0, 2, 4, 6, 8]
    for rank in (0, 1):
        found = two("resumed", rank)
        assert same(found["whole"]["weights"], found["end"]["weights"])
        assert found["whole"]["metrics"] == found["end"]["metrics"]
    assert two("resumed", 1)["state"] == {}


@pytest.mark.slow
def test_what_one_process_alone_knows_is_asked_there(two):
    assert set(steps(two.folder / "asked" / "run", "rank")) == {1, 4}
    assert set(steps(two.folder / "timed" / "run", "rank")) == {0, 1, 2, 3, 4}
    assert set(steps(two.folder / "followed" / "run", "rank")) == {0, 1, 2, 3, 4}
    assert steps(two.folder / "thrifty" / "run", "rank") == [0, 4]  # the first is free, and so is the last


@pytest.mark.slow
def test_batches_of_unequal_length_are_measured_whole(two):
    x = on_ranks.data(88).tensors[0].double()
    with ArtifactBuffer.open(two.folder / "uneven" / "run") as buffer:
        assert buffer["rows"].series("rows").tolist() == [21.0] * len(buffer["rows"])
        found = buffer["rows"].at(2)["total"]
    assert float(found) == pytest.approx(float(x[0::2][10:20].sum() + x[1::2][11:22].sum()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "by", "said"),
    [
        ("raise", 0, "ZeroDivisionError: broken on purpose"),
        ("behind", 0, "ZeroDivisionError: broken on purpose"),
        ("trigger", 0, "ZeroDivisionError: a trigger is broken"),
        ("nowhere", 0, "NotADirectoryError"),
        ("strange", 1, "SettingsError: a batch of type Strange"),
    ],
)
def test_an_error_of_one_process_is_everybodys(name, by, said, two):
    assert two(name, by).startswith(said)
    assert two(name, 1 - by).startswith(f"WorkerError: measuring failed on rank {by}: {said}")


@pytest.mark.slow
def test_parts_of_a_batch_that_do_not_go_together_are_refused_everywhere(two):
    for rank in (0, 1):
        assert two("unlike", rank).startswith("SettingsError: the processes' batches do not go together")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "warned"), [("warn", 1), ("skip", 0)])
def test_an_error_that_stops_nothing_stops_nobody(how, warned, two):
    assert [len(two(how, rank)["warned"]) for rank in (0, 1)] == [warned, 0]
    assert steps(two.folder / how / "run", "fails") == [0, 4]


@pytest.mark.slow
def test_a_live_edit_is_held_by_both_processes(two):
    for rank in (0, 1):
        found = two("span", rank)
        assert same(found["edited"]["weights"], found["by hand"]["weights"])
        assert same(two("span_beside_rows", rank)["weights"], found["by hand"]["weights"])
        assert not same(found["edited"]["weights"], two("bare", rank)["weights"])
        assert found["edited"]["hooks"] == 0
        assert same(two("span_resumed", rank)["weights"], two("span_resumed", rank)["by hand"]["weights"])
    assert steps(two.folder / "span" / "run", "edit") == [1, 3]
    assert steps(two.folder / "span_resumed" / "run", "edit") == [1, 3]
    assert steps(two.folder / "span_beside_rows" / "run", "edit") == [1, 3]


def test_processes_that_are_spawned_give_the_rows_of_one(tmp_path, monkeypatch):
    one = on_ranks.batch(tmp_path / "one")
    monkeypatch.setattr(on_ranks, "fit", on_ranks.Fit(2, "ddp_spawn"))
    two = on_ranks.batch(tmp_path / "two")
    assert rows(tmp_path / "one" / "run") == rows(tmp_path / "two" / "run")
    assert one["metrics"] == two["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_find_unused_parameters_true"])
def test_other_ways_to_start_processes(strategy, tmp_path):
    done = run(tmp_path, strategy, "monitored")
    assert done.returncode == 0, done.stderr
    on_ranks.monitored(tmp_path / "one")
    where = Path("tdhook") / "observer"
    assert rows(tmp_path / "one" / where) == rows(tmp_path / "monitored" / where)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
@pytest.mark.parametrize(("name", "row"), [("interrupted", "fails"), ("alone", "rank")])
def test_processes_end_together_when_one_is_stopped(name, row, strategy, tmp_path):
    done = run(tmp_path, strategy, name)
    assert done.returncode != 0
    assert steps(tmp_path / name / "run", row) == [0]
    with ArtifactBuffer(tmp_path / name / "run", resume=True) as buffer:  # nobody holds it
        assert len(buffer[row]) == 1


@pytest.mark.slow
def test_a_fit_whose_weights_are_spread_over_processes_is_refused_by_all_before_it_begins(two):
    for rank in (0, 1):
        found = two("sharded", rank)
        assert "ModelParallelStrategy spreads weights over processes" in found["error"]
        assert (found["step"], found["bare"]) == (0, 4)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, type("Own", (ModelParallelStrategy,), {})])
def test_strategies_that_spread_weights_are_refused(kind):
    """Lightning starts none of them but the last on a CPU, so that they are made without being set up."""
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__} spreads weights over processes"):
        refuse_sharded(object.__new__(kind))


def test_only_what_counts_steps_is_known_everywhere():
    known = [At(3), Every(optim_steps=2), Every(epochs=1), Geometric(last=8), At(1) | Every(batches=2)]
    assert all(trigger.everywhere for trigger in known)
    unknown = [Every(seconds=1.0), When(bool), When("row", "key", above=0.0), At(1) | When(bool), At(2, of="seconds")]
    assert not any(trigger.everywhere for trigger in unknown)
