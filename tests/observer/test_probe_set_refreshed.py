"""Probe sets that follow the states visited: every version is told apart, kept, and found again."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import ArtifactBuffer, At, Every, Method, Observer, ProbeSet
from tdhook_train.errors import KeyMissingError, SettingsError


@dataclass(frozen=True)
class Remembering(Method):
    """The mean of its input, and what it remembers: of the tick before, and of all ticks on these data."""

    writes: ClassVar = {"mean": "", "before": "", "ticks": ""}

    def measure(self, seen, model):
        seen.memo["ticks"] = seen.memo.get("ticks", 0) + 1
        before = torch.tensor(torch.nan) if seen.previous is None else seen.previous["mean"]
        return TensorDict(mean=seen.batch["input"].mean(), before=before, ticks=torch.tensor(seen.memo["ticks"]))


class Collector:
    """Gives out batches of four frames, one trajectory each, through its slot."""

    def __init__(self):
        self.postproc, self.given = None, 0

    def next(self):
        batch = frames(self.given)
        self.given += 1
        return batch if self.postproc is None else self.postproc(batch)


def frames(number):
    done = torch.tensor([[False], [False], [False], [True]])
    return TensorDict({"input": torch.arange(12.0).view(4, 3) + 100 * number, ("next", "done"): done}, [4])


def mean(*numbers):
    return torch.cat([frames(number)["input"] for number in numbers]).mean().item()


def train(observer, collector, batches, model, first=0):
    """A batch of four frames, then two steps on it, again and again."""
    for number in range(first, batches):
        observer.collected(collector.next())
        for step in range(2):
            observer.step(model, step=2 * number + step)


def observe(into, collector, **options):
    on = {
        "first": ProbeSet.first(collector, frames=4),
        "then": ProbeSet.first(collector, frames=8, refresh=Every(frames=16)),
        "now": "collected",
    }
    return Observer({"m": Remembering()}, when=Every(optim_steps=1), into=into, on=on, **options)


def test_states_are_exchanged_at_their_cadence_beside_those_that_stay(tmp_path):
    collector = Collector()
    with observe(tmp_path, collector) as observer:
        train(observer, collector, 8, nn.Linear(3, 2))
        first, then, now = (observer.buffer[f"m.{name}"] for name in ("first", "then", "now"))
        # batches 0 and 1; 16 frames are reached with batch 3, and batches 4 and 5 are the next eight
        expected = [mean(0, 1)] * 8 + [mean(4, 5)] * 6
        assert then.series("mean").tolist() == expected[: len(then)]
        assert then.steps.tolist() == list(range(2, 16))
        assert first.series("mean").unique().tolist() == [mean(0)]
        assert now.series("mean").tolist() == [mean(number) for number in range(8) for _ in range(2)][1:]
        assert then.series("ticks").tolist() == [*range(1, 9), *range(1, 7)]
        assert then.series("before").isnan().nonzero().flatten().tolist() == [0, 8]
        assert first.series("ticks").tolist() == list(range(1, 16))
        assert now.series("before")[1:].tolist() == now.series("mean")[:-1].tolist()
    data = then.series(("meta", "data"))
    assert data.unique().numel() == 2
    kept = [ProbeSet.load(path) for path in (tmp_path / "probe_sets").glob("then*.pt")]
    assert {probe_set.fingerprint: probe_set.td["input"].mean().item() for probe_set in kept} == {
        data[0].item(): mean(0, 1),
        data[-1].item(): mean(4, 5),
    }


def test_the_collector_gets_its_slot_back_each_time_and_no_batch_is_taken_twice():
    collector = Collector()
    one, two, three = (ProbeSet.first(collector, frames=n) for n in (4, 8, 4))
    for _ in range(5):
        start = collector.given
        collector.next()
        collector.next()
        assert collector.postproc is None
        assert [p.td["input"].mean().item() for p in (one, three)] == [mean(start)] * 2
        assert two.td["input"].mean().item() == mean(start, start + 1)
        for probe_set in (one, two, three):
            probe_set.refresh()
            probe_set.refresh()  # once is enough
    one.stay()
    three.stay()
    assert two.filling
    assert not one.filling
    two.stay()
    assert collector.postproc is None


def test_refreshes_that_overlap_pile_nothing_up_in_the_slot():
    collector = Collector()
    two = [ProbeSet.first(collector, frames=8), None]
    collector.next()
    two[1] = ProbeSet.first(collector, frames=8)
    for number in range(6):
        collector.next()  # one has enough, under the other
        two[number % 2].refresh()
        depth, slot = 0, collector.postproc
        while slot is not None:
            depth, slot = depth + 1, slot._before
        assert depth == 2


def test_a_slot_that_somebody_else_wraps_meanwhile_is_left_to_them():
    collector = Collector()
    probe_set = ProbeSet.first(collector, frames=4)
    inner, seen = collector.postproc, []
    collector.postproc = outer = lambda batch: seen.append(batch) or inner(batch)
    collector.next()
    probe_set.refresh()
    collector.next()
    assert probe_set.td["input"].mean().item() == mean(1)
    assert len(seen) == 2
    assert collector.postproc is outer


def test_closing_the_observer_gives_up_a_refresh(tmp_path):
    collector = Collector()
    observer = observe(tmp_path, collector)
    train(observer, collector, 5, nn.Linear(3, 2))
    assert collector.postproc is not None
    observer.close()
    assert collector.postproc is None


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_resumed_run_gives_the_rows_of_an_uninterrupted_one(stop, tmp_path):
    """Checkpoints before a refresh, while it waits for frames, and after it."""

    def on(collector):
        return {"then": ProbeSet.first(collector, frames=8, refresh=Every(frames=16)), "now": "collected"}

    def observer(name, collector, **options):
        into = tmp_path / name
        return Observer({"m": Remembering()}, when=Every(optim_steps=1), into=into, on=on(collector), **options)

    model, collector = nn.Linear(3, 2), Collector()
    with observer("whole", collector) as whole:
        train(whole, collector, 9, model)
        keys = ("mean", "before", ("meta", "data"), ("meta", "step"))
        expected = {(row, key): whole.buffer[row].series(key) for row in ("m.then", "m.now") for key in keys}
    collector = Collector()
    with observer("broken", collector) as broken:
        train(broken, collector, stop, model)
        state, given = broken.state_dict(), collector.given
        train(broken, collector, 8, model, first=stop)  # goes on past the checkpoint, then dies
    assert broken.buffer["m.then"].series(("meta", "data")).unique().numel() == 2
    collector = Collector()
    collector.given = given
    with observer("broken", collector, resume=True) as again:
        again.load_state_dict(state)
        train(again, collector, 9, model, first=stop)
        for (row, key), value in expected.items():
            torch.testing.assert_close(again.buffer[row].series(key), value, rtol=0, atol=0, equal_nan=True)


def test_without_a_checkpoint_the_version_of_the_last_row_is_taken(tmp_path):
    probe_set = ProbeSet(frames(0))
    with Observer({"m": Remembering()}, when=Every(optim_steps=1), into=tmp_path, on=probe_set) as observer:
        for number in range(3):
            observer.step(nn.Linear(3, 2) if not number else observer.subject.model, step=number + 1)
            probe_set.refresh(frames(number + 1))
    again = ProbeSet.first(frames=4)
    with Observer({"m": Remembering()}, when=At(9), into=tmp_path, on=again, resume=True) as observer:
        assert again.td["input"].mean().item() == mean(2)
        observer.step(nn.Linear(3, 2), step=9)
    assert ArtifactBuffer.open(tmp_path)["m"].series("mean").tolist() == [mean(0), mean(1), mean(2), mean(2)]
    known = ProbeSet.load(next(iter((tmp_path / "probe_sets").glob("probe_set.*.pt"))))
    with Observer({"m": Remembering()}, when=At(9), into=tmp_path, on=known, resume=True) as observer:
        assert observer.subject is None  # any version of the run's is welcome
    (tmp_path / "probe_sets" / "probe_set.pt").unlink()
    observer = Observer({"m": Remembering()}, when=At(9), into=tmp_path, on=ProbeSet(frames(0)), resume=True)
    state = observer.state_dict()
    state["probe_sets"][""]["data"] = 17
    with pytest.raises(KeyMissingError, match="holds no probe set '' of content hash 0x11"):
        observer.load_state_dict(state)
    observer.close()


def test_a_version_that_nothing_was_measured_on_yet_is_found_again(tmp_path):
    probe_set = ProbeSet(frames(0))
    with Observer({"m": Remembering()}, when=At(0), into=tmp_path, on=probe_set) as observer:
        observer.step(nn.Linear(3, 2), step=0)
        probe_set.refresh(frames(1))
        state = observer.state_dict()
    again = ProbeSet.first(frames=4)
    with Observer({"m": Remembering()}, when=At(1), into=tmp_path, on=again, resume=True) as observer:
        assert again.td["input"].mean().item() == mean(0)
        observer.load_state_dict(state)
        assert again.td["input"].mean().item() == mean(1)


def test_by_hand_states_are_exchanged_at_once_or_not_at_all():
    probe_set = ProbeSet(frames(0), feature_names={"input": ["a", "b", "c"]})
    before = probe_set.fingerprint
    with pytest.raises(KeyMissingError, match="feature_names names 'input', which the probe set has not"):
        probe_set.refresh(TensorDict(other=torch.zeros(2, 3), batch_size=[2]))
    assert probe_set.fingerprint == before == ProbeSet(frames(0)).fingerprint
    assert "input" in probe_set.td
    probe_set.refresh(torch.stack([frames(1), frames(2)]))
    assert probe_set.groups.tolist() == [0] * 4 + [1] * 4
    assert probe_set.shape == (2, 4)
    probe_set.refresh(ProbeSet(frames(3), groups="rows"))
    assert probe_set.independent
    assert probe_set.fingerprint == ProbeSet(frames(3)).fingerprint
    with pytest.raises(SettingsError, match=r"refresh\(\) needs states"):
        probe_set.refresh()
    with pytest.raises(SettingsError, match="refresh=100 is no trigger"):
        ProbeSet.first(refresh=100)


def test_environments_end_a_trajectory_where_no_flag_does():
    cut = torch.stack([frames(0)[:3], frames(1)[1:]])
    assert ProbeSet(cut).groups.tolist() == [0, 0, 0, 1, 1, 1]
    filled = ProbeSet.first(frames=6)
    filled.add(cut)
    assert filled.td["input"][:, 0].tolist() == [103, 106, 109]  # the other was cut off
    filled = ProbeSet.first(frames=6)
    filled.add(torch.stack([frames(0)[:3], frames(1)[:3]]))
    assert filled.groups.tolist() == [0, 0, 0, 1, 1, 1]  # both were
