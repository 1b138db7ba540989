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
    ],
)
def test_half_a_bound_is_refused(given):
    named = given[-1] if isinstance(given[-1], dict) else {}
    named = {"above": 1} | named if "over" in named else named
    with pytest.raises(SettingsError, match=r"When|over="):
        When(*[part for part in given if not isinstance(part, dict)], **named)


def test_a_function_of_the_clock_still_decides():
    clock = Clock()
    trigger = When(lambda clock: clock.frames > 10)
    assert not trigger.due(clock)
    clock.frames = 11
    assert trigger.due(clock)
    assert trigger.rows == frozenset()
