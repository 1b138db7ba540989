"""Ctrl-C in the middle of a measurement leaves nothing, no half row, and a run that can be resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_trainers import AFTER, begin, hooks_on, left_behind, rows_of, same, saved
from tiny import make

from tdhook_train import ArtifactBuffer
from tdhook_train.buffer.commit_file import CommitFile
from tdhook_train.health import EffectiveRank
from tdhook_train.observer import measure

pytestmark = pytest.mark.filterwarnings("ignore:The '(optimizer|post_loss)' hook stage will be replaced:FutureWarning")

PLACES = {
    "the shared pass": (measure, "look"),
    "a method": (EffectiveRank, "measure"),
    "a commit": (CommitFile, "invalidate"),  # the row is neither what was there before nor what comes
    "between two rows": (ArtifactBuffer, "append"),
}


def interrupt(monkeypatch: Any, place: str, *, after: int) -> list[int]:
    """Raise KeyboardInterrupt behind one of the calls of a function; count them."""
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        given = real(*args, **kwargs)
        if len(calls) == after:
            raise KeyboardInterrupt
        return given

    monkeypatch.setattr(owner, name, interrupted)
    return calls


def modes(trainer: Any) -> list[bool]:
    return [part.training for part in trainer.loss_module.modules()]


def cut_short(name: str, door: str, path: Any) -> dict[str, list[int]]:
    """Train until the interruption; return the steps of each row then."""
    cut, observer = begin(name, door, path / "run")
    saved(cut, path / "checkpoint", fails=False)
    state: dict[str, Any] = {}
    cut.register_op("process_optim_batch", lambda _: state.update(rng=torch.get_rng_state(), modes=modes(cut)))
    with observer:
        with pytest.raises(KeyboardInterrupt):
            cut.train()
        steps = {row: observer.buffer[row].steps.tolist() for row in observer.buffer}
        assert modes(cut) == state["modes"]
        if door == "loss":  # the hook measures before the state is noted
            assert torch.equal(torch.get_rng_state(), state["rng"])
    assert hooks_on(cut) == hooks_on(make(name))  # TorchRL's own
    cut.collector.shutdown()
    return steps


def refuse_half_rows(path: Any, steps: dict[str, list[int]], expected: dict[str, torch.Tensor]) -> None:
    """Find the rows that were there when the run ended, each holding what the uninterrupted run has."""
    stored = ArtifactBuffer.open(path)
    for row, known in steps.items():
        assert stored[row].steps.tolist() == known
        for key, value in stored[row][:].exclude("meta").items(True, True):
            assert torch.equal(value, expected[f"{row}/{key}"][: len(known)])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "door"), [("sac", "loss"), ("td3", "hook")])
def test_a_run_that_is_interrupted_in_a_measurement_is_resumed_as_if_it_had_not_been(
    name, door, place, monkeypatch, tmp_path
):
    whole, observer = begin(name, door, tmp_path / "whole")
    with monkeypatch.context() as patch, observer:
        calls = interrupt(patch, place, after=-1)
        whole.train()
        observer.finish()
        expected, end = rows_of(observer), left_behind(whole)
    with monkeypatch.context() as patch:
        interrupt(patch, place, after=round(len(calls) * 0.8))
        steps = cut_short(name, door, tmp_path)
    refuse_half_rows(tmp_path / "run", steps, expected)
    resumed, observer = begin(name, door, tmp_path / "run", resume=True)
    with observer:
        resumed.load_from_file(tmp_path / "checkpoint")
        assert max(observer.buffer["sum.now"].steps.tolist()) <= observer.steps_taken == AFTER * 3
        resumed.train()
        observer.finish()
        found = rows_of(observer)
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in expected.items()}
    assert same(left_behind(resumed), end)
