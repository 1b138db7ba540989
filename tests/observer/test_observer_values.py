"""What was measured decides what is due: other rows, marks, calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import At, Every, Method, Observer, ProbeSet, When
from tdhook_train.errors import KeyMissingError, SettingsError
from tdhook_train.schedule import Clock

# a value for each step: beyond 0.3 at 2 and 3, at 5, and at 8
SERIES = (0.1, 0.3, 0.4, 0.5, 0.2, 0.9, float("nan"), 0.1, 0.35)


@dataclass(frozen=True)
class Scripted(Method):
    """Two numbers that the step alone decides; the second is always 0."""

    writes: ClassVar = {"dormant": "layer", "pair": "item"}

    def labels(self, seen: Any, model: Any) -> dict[str, list[Any]]:
        return {}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        value = torch.tensor(SERIES[seen.clock.step])
        return TensorDict({"dormant": value.reshape(1), "pair": torch.stack([value, torch.zeros(())])})


@dataclass(frozen=True)
class Steps(Method):
    writes: ClassVar = {"step": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return TensorDict({"step": torch.tensor(float(seen.clock.step))})


def run(observer: Observer, first: int = 0, last: int = len(SERIES), model: nn.Module | None = None) -> nn.Module:
    model = model or nn.Linear(3, 1)
    td = TensorDict(input=torch.zeros(4, 3), batch_size=[4])
    for step in range(first, last):
        observer.step(model, td, step=step)
    return model


EACH = At(0) | Every(optim_steps=1)


@pytest.mark.parametrize(
    ("trigger", "steps"),
    [
        (When("health", "dormant", above=0.3), [2, 5, 8]),
        (When("health", "dormant", below=0.3), [0, 4, 7]),
        (When("health", "pair", above=0.3), [2, 5, 8]),
        (When("health", "pair", above=0.3, over="all"), []),
        (When("health", "pair", above=0.19, over="mean"), [2, 5]),
        (When("health", "dormant", above=0.3) | At(0), [0, 2, 5, 8]),
    ],
)
def test_a_row_is_due_where_a_value_goes_beyond_its_bound(trigger, steps, tmp_path):
    with Observer(
        {"health": Scripted(), "other": Steps()}, when={"health": EACH, "other": trigger}, into=tmp_path
    ) as observer:
        run(observer)
        assert ("other" in observer.buffer) == bool(steps)
        assert not steps or observer.buffer["other"].series("step").tolist() == steps
        assert len(observer.buffer["health"].steps) == len(SERIES)


def test_a_crossing_is_seen_on_the_rows_that_are_there(tmp_path):
    when = {"health": Every(optim_steps=3), "other": When("health", "dormant", above=0.3)}
    with Observer({"health": Scripted(), "other": Steps()}, when=when, into=tmp_path) as observer:
        run(observer)
        assert observer.buffer["health"].steps.tolist() == [3, 6]
        assert observer.buffer["other"].steps.tolist() == [3]


def test_in_the_background_what_follows_is_due_when_the_row_has_come(tmp_path):
    when = {"health": At(2), "other": When("health", "dormant", above=0.3)}
    with Observer({"health": Scripted(), "other": Steps()}, when=when, into=tmp_path, background=True) as observer:
        model = run(observer, last=3)
        observer.state_dict()  # waits for the row
        run(observer, 3, 5, model)
        observer.state_dict()
        assert observer.buffer["other"].steps.tolist() == [3]


def test_rows_may_be_due_at_their_own_times_and_the_last_weights_are_measured_by_all(tmp_path):
    when = {"health": Every(optim_steps=2), "other": At(1, 4)}
    with Observer({"health": Scripted(), "other": Steps()}, when=when, into=tmp_path) as observer:
        run(observer, last=8)
        assert observer.finish(step=7)
        assert observer.buffer["health"].steps.tolist() == [2, 4, 6, 7]
        assert observer.buffer["other"].steps.tolist() == [1, 4, 7]
        assert not observer.finish(step=7)


def test_one_source_of_several_decides(tmp_path):
    td = TensorDict(input=torch.zeros(4, 3), batch_size=[4])
    on = {"fixed": ProbeSet(td), "now": "batch"}
    when = {"health": EACH, "other": When("health.fixed", "dormant", above=0.3)}
    with Observer({"health": Scripted(), "other": Steps()}, when=when, into=tmp_path, on=on) as observer:
        run(observer)
        assert observer.buffer["other.now"].steps.tolist() == [2, 5, 8]


def test_alerts_mark_the_time_axis_and_call_back(tmp_path):
    told = []
    with Observer({"health": Scripted()}, when=EACH, into=tmp_path) as observer:
        observer.alert(When("health", "dormant", above=0.3), mark="asleep", call=lambda o: told.append(o.clock.step))
        observer.alert(At(4), mark="four")
        run(observer)
        marks = [(event["step"], event["label"]) for event in observer.buffer.events("mark")]
    assert told == [2, 5, 8]
    assert marks == [(2, "asleep"), (4, "four"), (5, "asleep"), (8, "asleep")]


def test_an_alert_that_would_say_nothing_is_refused(tmp_path):
    observer = Observer({"health": Scripted()}, when=EACH, into=tmp_path)
    with observer, pytest.raises(SettingsError, match="an alert puts a mark or calls"):
        observer.alert(At(4))


def test_a_resumed_run_does_not_see_a_crossing_twice(tmp_path):
    model = nn.Linear(3, 1)

    def observed() -> Observer:
        when = {"health": EACH, "other": When("health", "dormant", above=0.3)}
        return Observer({"health": Scripted(), "other": Steps()}, when=when, into=tmp_path, resume=True)

    with observed() as observer:
        run(observer, 0, 3, model)
        state = observer.state_dict()
        run(observer, 3, 6, model)
    with observed() as observer:
        observer.load_state_dict(state)
        assert observer.buffer["other"].steps.tolist() == [2]
        run(observer, 3, len(SERIES), model)
        assert observer.buffer["other"].steps.tolist() == [2, 5, 8]


@pytest.mark.parametrize("background", [False, 100])
def test_who_goes_back_in_one_process_sees_a_crossing_again(background, tmp_path):
    when = {"health": EACH, "other": When("health", "dormant", above=0.3)}
    model = nn.Linear(3, 1)
    methods = {"health": Scripted(), "other": Steps()}
    with Observer(methods, when=when, into=tmp_path, background=background) as o:
        empty = o.state_dict()
        for _ in range(2):
            run(o, 0, 4, model)
            o.state_dict()  # waits for the rows
            run(o, 4, 5, model)
            o.finish(step=4)
            assert o.buffer["other"].steps.tolist() == ([4] if background else [2, 4])
            o.load_state_dict(empty)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_crossing_that_came_with_a_checkpoint_is_seen_after_it(resumed, tmp_path):
    model, told = nn.Linear(3, 1), []

    def observed() -> Observer:
        observer = Observer({"health": Scripted()}, when=EACH, into=tmp_path, resume=True, background=100)
        observer.alert(When("health", "dormant", above=0.3), call=lambda o: told.append(o.clock.step))
        return observer

    with observed() as observer:
        run(observer, 0, 2, model)
        observer.state_dict()  # whatever came by now,
        observer.step(model, TensorDict(input=torch.zeros(4, 3), batch_size=[4]), step=2)
        state = observer.state_dict()
        assert told == []
        if not resumed:
            run(observer, 3, 4, model)
    if resumed:
        told.clear()  # closing told of it as well, behind the checkpoint
        with observed() as observer:
            observer.load_state_dict(state)
            assert observer.state_dict() == state
            run(observer, 3, 4, model)
    assert told == [3]


def test_a_crossing_among_rows_that_come_together_is_seen(tmp_path):
    model, told = nn.Linear(3, 1), []
    with Observer({"health": Scripted()}, when=EACH, into=tmp_path, background=100) as observer:
        observer.alert(When("health", "dormant", above=0.3), call=lambda o: told.append(o.clock.step))
        run(observer, 0, 1, model)
        observer.state_dict()
        with observer.pause():
            run(observer, 1, 2, model)
        assert told == []
        worker = observer._ticks._worker
        worker._exchange, exchange = (lambda **_: None), worker._exchange  # nothing comes for a while
        run(observer, 2, 5, model)
        worker._exchange = exchange
        observer.state_dict()
        assert observer.buffer["health"].series("dormant").flatten().tolist() == pytest.approx([0.1, 0.4, 0.5, 0.2])
        with observer.pause():
            run(observer, 5, 6, model)
        assert told == []
        run(observer, 6, 7, model)
    assert told == [6]


@pytest.mark.parametrize("background", [False, True])
def test_what_comes_when_an_observer_is_closed_alerts_too(background, tmp_path):
    told = []
    with Observer({"health": Scripted()}, when=EACH, into=tmp_path, background=background) as observer:
        observer.alert(When("health", "dormant", above=0.3), mark="up", call=lambda o: told.append(o.close()))
        run(observer, last=3)
    assert told == [None]


def test_the_last_weights_are_measured_once_whatever_follows_from_them(tmp_path):
    when = {"health": EACH, "other": When("health", "dormant", above=0.3)}
    told = []
    with Observer({"health": Scripted(), "other": Steps()}, when=when, into=tmp_path) as observer:
        observer.alert(When("health", "dormant", above=0.3), call=lambda o: told.append(o.clock.step))
        run(observer, last=2)
        observer.finish(step=2)
        assert observer.buffer["other"].steps.tolist() == [2]
    assert told == [2]


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ({"health": At(0)}, "no trigger for 'other'"),
        ({"health": At(0), "other": At(0), "heath": At(0)}, "'heath'.* names no row; did you mean 'health'"),
        ({"health": At(0), "other": When("heath", "x", above=1)}, "'heath'.* not measured; did you mean 'health'"),
        ({"health": At(0), "other": 3}, "when=3 is no trigger"),
        (3, "when=3 is no trigger"),
    ],
)
def test_triggers_that_mean_nothing_are_refused(when, said, tmp_path):
    with pytest.raises(SettingsError, match=said):
        Observer({"health": Scripted(), "other": Steps()}, when=when, into=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", [("a", "b"), "a.b"])
def test_a_nested_key_may_be_written_as_errors_write_it(key):
    clock, trigger = Clock(), When("health", key, above=1)
    clock.fresh = {"health": [{("a", "b"): torch.ones(2, dtype=torch.bool)}]}
    assert not trigger.due(clock)
    clock.fresh = {"health": [{("a", "b"): torch.tensor(2)}]}
    assert trigger.due(clock)


def test_a_row_that_says_nothing_is_no_return_within_the_bound():
    clock, trigger, due = Clock(), When("health", "x", above=0.3), []
    for value in (0.9, float("nan"), 0.9):
        clock.fresh = {"health": [{"x": torch.tensor([value])}]}
        due.append(trigger.due(clock))
        clock.asked()
    assert due == [True, False, False]


def test_a_cadence_goes_on_while_a_value_is_beyond_its_bound(tmp_path):
    told: list[int] = []
    # beyond at 2, 3, 5, 6 (which says nothing) and 8
    beyond = When("health", "dormant", above=0.3, fires="while")
    when = {"health": EACH, "other": Every(optim_steps=2) & beyond}
    with Observer({"health": Scripted(), "other": Steps()}, when=when, into=tmp_path) as observer:
        observer.alert(beyond, call=lambda o: told.append(o.clock.step))
        run(observer)
        # a cadence is asked before the row of its step: what is known then is the row before
        assert observer.buffer["other"].steps.tolist() == [4, 6]
    assert sorted(set(told)) == [2, 3, 4, 5, 6, 7, 8]


def test_a_key_that_a_row_has_not_is_named(tmp_path):
    when = {"health": At(0), "other": When("health", "dorman", above=1)}
    observer = Observer({"health": Scripted(), "other": Steps()}, when=when, into=tmp_path)
    with observer, pytest.raises(KeyMissingError, match="'health' hold no 'dorman'; did you mean 'dormant'"):
        run(observer)


@pytest.mark.parametrize(
    "given",
    [
        ("health",),
        ("health", "x"),
        ("health", "x", {"above": 1, "below": 0}),
        (bool, "x"),
        ("a", "b", {"over": "most"}),
        ("a", "b", {"fires": "often"}),
    ],
)
def test_half_a_bound_is_refused(given):
    named = given[-1] if isinstance(given[-1], dict) else {}
    named = {"above": 1} | named if {"over", "fires"} & set(named) else named
    with pytest.raises(SettingsError, match=r"When|over=|fires="):
        When(*[part for part in given if not isinstance(part, dict)], **named)


def test_a_function_of_the_clock_still_decides():
    clock = Clock()
    trigger = When(lambda clock: clock.frames > 10)
    assert not trigger.due(clock)
    clock.frames = 11
    assert trigger.due(clock)
    assert trigger.rows == frozenset()
