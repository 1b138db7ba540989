"""A sweep that was interrupted, or whose checkpoints become more, ends in the rows of one that was not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sweeps
import torch
from sweeps import Counted, calls, methods, run, write

from tdhook_train import ArtifactBuffer, At, Observer
from tdhook_train.checkpoints import differences
from tdhook_train.errors import RunExistsError, SchemaError
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import RidgeProbe

STEPS = [0, 2, 5, 10, 40, 100]


@pytest.fixture
def whole(tmp_path):
    """An uninterrupted sweep."""
    run(write(tmp_path / "ckpt", STEPS), tmp_path / "whole", methods(tmp_path / "calls"))
    assert calls(tmp_path / "calls") == STEPS
    (tmp_path / "calls").unlink()
    return tmp_path / "whole"


def assert_rows(found: Path, whole: Path) -> None:
    assert differences(whole, found) == []
    with ArtifactBuffer.open(found) as buffer:
        assert {name: buffer[name].steps.tolist() for name in buffer} == dict.fromkeys(buffer, STEPS)


SCRIPT = """
import sys; sys.path[:0] = [{tests!r}]
from pathlib import Path
from sweeps import methods, run
run(Path({ckpt!r}), Path({into!r}), methods(Path({calls!r}), 10, {does!r}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT"])
def test_killed_in_the_middle(signal, whole, tmp_path):
    does = f"import os, signal; os.kill(os.getpid(), signal.{signal})"
    into, file = tmp_path / "cut", tmp_path / "calls"
    script = SCRIPT.format(
        tests=str(Path(sweeps.__file__).parent), ckpt=str(tmp_path / "ckpt"), into=str(into), calls=str(file), does=does
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0, done.stderr
    assert calls(file) == [0, 2, 5, 10]
    file.unlink()
    run(tmp_path / "ckpt", into, methods(file))
    assert calls(file) == [10, 40, 100]  # and none of those that are finished
    assert_rows(into, whole)


@pytest.mark.parametrize("place", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
def test_interrupted_between_two_rows(place, whole, monkeypatch, tmp_path):
    real, counted = ArtifactBuffer.append, []

    def append(*args, **kwargs):
        counted.append(1)
        if len(counted) == place:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactBuffer, "append", append)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "ckpt", tmp_path / "cut", methods(tmp_path / "calls"))
    (tmp_path / "calls").unlink()
    run(tmp_path / "ckpt", tmp_path / "cut", methods(tmp_path / "calls"))
    assert calls(tmp_path / "calls") == STEPS[(place - 1) // 3 :]
    assert_rows(tmp_path / "cut", whole)


def test_checkpoints_that_come_later_beside_a_training_that_drops_old_ones(whole, tmp_path):
    for step in STEPS:
        write(tmp_path / "kept", [step])
        run(tmp_path / "kept", tmp_path / "beside", methods(tmp_path / "calls"))
        for old in (tmp_path / "kept").iterdir():
            if old.stem not in ("0", str(step)):
                old.unlink()
    assert calls(tmp_path / "calls") == STEPS
    assert_rows(tmp_path / "beside", whole)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_checkpoints_between_those_done(workers, whole, tmp_path):
    into, file = tmp_path / "finer", tmp_path / "calls"
    write(tmp_path / "few", [0, 5, 40])
    run(tmp_path / "few", into, methods(file))
    file.unlink()
    write(tmp_path / "few", STEPS)
    run(tmp_path / "few", into, methods(file), workers=workers)
    # 5 and 40 once more: another checkpoint comes before them now, which rows compare with
    assert sorted(set(calls(file))) == [2, 5, 10, 40, 100]
    assert_rows(into, whole)
    file.unlink()
    run(tmp_path / "few", into, methods(file))
    assert calls(file) == []


def test_methods_that_are_added_are_measured_alone(whole, tmp_path):
    into, given = tmp_path / "more", methods(tmp_path / "calls")
    run(tmp_path / "ckpt", into, {"probe": given["probe"], "counted": given["counted"]})
    (tmp_path / "calls").unlink()
    run(tmp_path / "ckpt", into, given)
    assert calls(tmp_path / "calls") == []
    assert_rows(into, whole)


def test_settings_that_changed_are_refused_before_anything_is_measured(whole, tmp_path):
    given = methods(tmp_path / "calls") | {"probe": RidgeProbe("0", target="y")}
    with pytest.raises(SchemaError, match=r"probe: settings differ: .*'layers': '0'"):
        run(tmp_path / "ckpt", whole, given)
    with pytest.raises(RunExistsError, match="was swept with seed=0, not seed=1"):
        run(tmp_path / "ckpt", whole, methods(tmp_path / "calls"), seed=1)
    assert calls(tmp_path / "calls") == []
    assert_rows(whole, whole)


def test_a_checkpoint_that_changed_since_is_refused(whole, tmp_path):
    torch.save({"model": sweeps.net().state_dict(), "step": 5}, tmp_path / "ckpt" / "5.pt")
    with pytest.raises(RunExistsError, match=r"holds rows of step 5 that were measured on other weights than .*5\.pt"):
        run(tmp_path / "ckpt", whole, methods(tmp_path / "calls"))
    assert_rows(whole, whole)


def test_a_file_that_was_written_anew_with_the_same_weights_is_done(whole, tmp_path):
    content = torch.load(tmp_path / "ckpt" / "5.pt")
    torch.save({**content, "optimizer": {"lr": 1}}, tmp_path / "ckpt" / "last.pt")
    (tmp_path / "ckpt" / "5.pt").unlink()
    run(tmp_path / "ckpt", whole, methods(tmp_path / "calls"))
    assert calls(tmp_path / "calls") == []


def test_a_folder_that_holds_a_live_run_is_left_alone(tmp_path):
    with Observer({"rank": EffectiveRank()}, when=At(0), into=tmp_path / "live") as observer:
        observer.step(sweeps.net(), sweeps.data(), step=0)
    with pytest.raises(RunExistsError, match=r"live holds rows of step 0, which no sweep made"):
        run(write(tmp_path / "ckpt", [1]), tmp_path / "live", {"rank": EffectiveRank()})
    with ArtifactBuffer.open(tmp_path / "live") as buffer:
        assert buffer["rank"].steps.tolist() == [0]
    after = run(tmp_path / "ckpt", tmp_path / "live", {"rank": EffectiveRank()}, overwrite=True)
    assert after["rank"].steps.tolist() == [1]


def test_other_data_are_refused(whole, tmp_path):
    from tdhook_train import sweep

    with pytest.raises(SchemaError, match="were measured on ProbeSet"):
        sweep(
            tmp_path / "ckpt",
            sweeps.net,
            {"counted": Counted(str(tmp_path / "calls"))},
            sweeps.data()[:20],
            whole,
            in_keys=["input"],
            progress=False,
        )
