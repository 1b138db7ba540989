"""What is wrong with checkpoints or settings is said; as asked, the rest is measured all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sweeps import calls, data, methods, net, run, write
from torch import nn

from tdhook_train import ArtifactBuffer, ProbeSet, sweep
from tdhook_train.errors import CheckpointError, SettingsError
from tdhook_train.health import EffectiveRank

STEPS = [0, 2, 5, 10]


class Setting:
    """What only a pickle can hold."""


def broken(folder: Any, how: str) -> None:
    """Write a checkpoint of step 5 that cannot be used."""
    path = folder / "5.pt"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:500])
        return
    states: dict[str, Any] = {
        "missing": nn.Sequential(nn.Linear(3, 4)).state_dict(),
        "shape": nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).state_dict(),
        "more": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Linear(1, 1)).state_dict(),
        "kind": {name: value.long() for name, value in net().state_dict().items()},
        "pickle": net().state_dict(),
    }
    content = {"model": states[how], "step": 5}
    torch.save(content | ({"setting": Setting()} if how == "pickle" else {}), path)


SAID = {
    "cut": r"5\.pt is cut short",
    "missing": r"5\.pt lacks '2\.weight', '2\.bias' of the Sequential",
    "shape": r"5\.pt holds '0\.weight' of shape \(5, 3\), which is \(4, 3\)",
    "more": r"5\.pt also holds '3\.bias', '3\.weight', which the Sequential that was built has not",
    "kind": r"5\.pt holds '0\.weight' of torch\.int64, which is torch\.float32",
    "pickle": r"5\.pt asks for more than weights.*allow_pickle=True \(--allow-pickle on .*\. It asks for \S+\.Setting$",
}


@pytest.mark.parametrize("how", SAID)
@pytest.mark.parametrize("on_error", ["raise", "warn", "skip"])
def test_a_checkpoint_that_cannot_be_used(on_error, how, tmp_path):
    broken(write(tmp_path / "ckpt", STEPS), how)
    given, into = methods(tmp_path / "calls"), tmp_path / "run"
    if on_error == "raise":
        with pytest.raises(CheckpointError, match=SAID[how]):
            run(tmp_path / "ckpt", into, given)
    elif on_error == "warn":
        with pytest.warns(UserWarning, match=SAID[how]):
            run(tmp_path / "ckpt", into, given, on_error=on_error)
    else:
        run(tmp_path / "ckpt", into, given, on_error=on_error)
    with ArtifactBuffer.open(into) as buffer:
        (note,) = buffer.events("error")
        assert note["path"] == str(tmp_path / "ckpt" / "5.pt")
        if on_error != "raise":
            assert {tuple(buffer[name].steps.tolist()) for name in given} == {(0, 2, 10)}
    write(tmp_path / "ckpt", [5])  # it was mended
    run(tmp_path / "ckpt", into, given)
    with ArtifactBuffer.open(into) as buffer:
        assert {tuple(buffer[name].steps.tolist()) for name in given} == {tuple(STEPS)}


def test_a_pickle_is_measured_where_that_is_allowed(tmp_path):
    broken(write(tmp_path / "ckpt", STEPS), "pickle")
    run(tmp_path / "ckpt", tmp_path / "run", methods(tmp_path / "calls"), allow_pickle=True)
    assert calls(tmp_path / "calls") == STEPS


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_weights_at_initialisation_that_cannot_be_used(on_error, tmp_path):
    write(tmp_path / "ckpt", STEPS)
    torch.save({"model": nn.Linear(1, 1).state_dict(), "step": 0}, tmp_path / "ckpt" / "0.pt")
    if on_error == "raise":
        with pytest.raises(CheckpointError, match=r"0\.pt lacks"):
            run(tmp_path / "ckpt", tmp_path / "run", methods(tmp_path / "calls"))
    else:
        run(tmp_path / "ckpt", tmp_path / "run", methods(tmp_path / "calls"), on_error=on_error)
        assert calls(tmp_path / "calls") == STEPS[1:]


def test_a_method_that_fails_leaves_the_other_rows(tmp_path):
    write(tmp_path / "ckpt", STEPS)
    given = methods(tmp_path / "calls", 5, "1 / 0")
    with pytest.raises(ZeroDivisionError) as caught:
        run(tmp_path / "ckpt", tmp_path / "run", given)
    assert any("'counted' of" in note and "5.pt" in note for note in caught.value.__notes__)
    with pytest.warns(UserWarning, match=r"measuring 'counted' of .*5\.pt failed: division by zero"):
        run(tmp_path / "ckpt", tmp_path / "run", given, on_error="warn")
    with ArtifactBuffer.open(tmp_path / "run") as buffer:
        assert buffer["probe"].steps.tolist() == STEPS
        assert buffer["counted"].steps.tolist() == [0, 2, 10]


def test_two_files_of_one_step(tmp_path):
    write(tmp_path / "ckpt", STEPS)
    torch.save(torch.load(tmp_path / "ckpt" / "5.pt"), tmp_path / "ckpt" / "last.pt")  # the same weights
    run(tmp_path / "ckpt", tmp_path / "run", methods(tmp_path / "calls"))
    assert calls(tmp_path / "calls") == STEPS
    torch.save({"model": net().state_dict(), "step": 5}, tmp_path / "ckpt" / "other.pt")
    said = r"5\.pt and .*other\.pt are both of step 5, with different weights; leave one out, or say by step="
    with pytest.raises(CheckpointError, match=said):
        run(tmp_path / "ckpt", tmp_path / "again", methods(tmp_path / "calls"))
    with pytest.warns(UserWarning, match=said):
        run(tmp_path / "ckpt", tmp_path / "again", methods(tmp_path / "calls"), on_error="warn")


def test_nothing_matches(tmp_path):
    for given in (str(tmp_path / "*.ckpt"), tmp_path, []):
        with pytest.raises(CheckpointError, match="no checkpoint matches"):
            run(given, tmp_path / "run", methods(tmp_path / "calls"))
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*a\.pt"):
        run([tmp_path / "a.pt"], tmp_path / "run", methods(tmp_path / "calls"))


def test_a_list_may_hold_files_folders_and_globs(tmp_path):
    for folder, steps in (("a", [0, 2]), ("b", [5, 10]), ("c", [20, 100])):
        write(tmp_path / folder, steps)
    given = [str(tmp_path / "a" / "*.pt"), tmp_path / "b", tmp_path / "c" / "100.pt"]
    found = run(given, tmp_path / "run", {"rank": EffectiveRank()})
    assert found["rank"].steps.tolist() == [0, 2, 5, 10, 100]
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*\*\.ckpt"):
        run([*given, tmp_path / "a" / "*.ckpt"], tmp_path / "other", {"rank": EffectiveRank()})


def test_what_a_run_keeps_itself_is_no_checkpoint(tmp_path):
    given = {"rank": EffectiveRank()}
    run(write(tmp_path / "ckpt", [0]), tmp_path / "run", given)
    with pytest.raises(CheckpointError, match="no checkpoint matches"):
        run(tmp_path / "run", tmp_path / "after", given)
    write(tmp_path / "run" / "ckpt", STEPS)
    assert run(tmp_path / "run", tmp_path / "after", given)["rank"].steps.tolist() == STEPS


def test_steps_from_names_in_the_order_of_numbers(tmp_path):
    (tmp_path / "ckpt").mkdir()
    for step in (9, 10, 100):
        torch.save(net().state_dict(), tmp_path / "ckpt" / f"epoch=1-step={step}.pt")
        torch.save(net().state_dict(), tmp_path / f"run2_{step}.pt")
    given = {"rank": EffectiveRank()}
    assert run(tmp_path / "ckpt", tmp_path / "a", given)["rank"].steps.tolist() == [9, 10, 100]
    paths = str(tmp_path / "run2_*.pt")
    assert run(paths, tmp_path / "b", given, step=r"_(\d+)\.pt")["rank"].steps.tolist() == [9, 10, 100]
    by_function = run(paths, tmp_path / "c", given, step=lambda path: 2 * int(path.stem.split("_")[1]))
    assert by_function["rank"].steps.tolist() == [18, 20, 200]
    with pytest.raises(CheckpointError, match="says neither inside nor in its name of which step it is; give step="):
        run(paths, tmp_path / "d", given)
    with pytest.raises(SettingsError, match=r"step='_\\\\d\+' needs a group around the number"):
        run(paths, tmp_path / "d", given, step=r"_\d+")
    with pytest.raises(SettingsError, match="is no regular expression"):
        run(paths, tmp_path / "d", given, step="(")
    with pytest.raises(CheckpointError, match=r"step='x\(\\\\d\+\)' finds no number in"):
        run(paths, tmp_path / "d", given, step=r"x(\d+)")


def test_settings_that_are_wrong(tmp_path):
    write(tmp_path / "ckpt", [0])
    given = {"rank": EffectiveRank()}
    for options, said in (
        ({"on_error": "skipp"}, "on_error='skipp'; did you mean 'skip'"),
        ({"workers": 0}, "workers=0 is no number of processes"),
    ):
        with pytest.raises(SettingsError, match=said):
            run(tmp_path / "ckpt", tmp_path / "run", given, **options)
    with pytest.raises(SettingsError, match="data= takes a TensorDict, a ProbeSet, several by name, or a run's folder"):
        sweep(tmp_path / "ckpt", net, given, [1], tmp_path / "run")
    with pytest.raises(SettingsError, match=r"data=ProbeSet.* is not complete"):
        sweep(tmp_path / "ckpt", net, given, ProbeSet.first(), tmp_path / "run")
    with pytest.raises(CheckpointError, match="build\\(\\) gave a int, which is no module"):
        sweep(tmp_path / "ckpt", lambda: 3, given, data(), tmp_path / "run", progress=False)
