"""Triggers fire where a boundary was crossed, once, and at the same steps after a resume."""

import itertools
import pickle
import random

import pytest

from tdhook_train import At, Budget, Every, Geometric, When
from tdhook_train.errors import BudgetError, SettingsError
from tdhook_train.schedule import Clock


def fired(trigger, readings, *, name="step", clock=None):
    """The readings of a clock at which a trigger was due."""
    clock = Clock() if clock is None else clock
    out = []
    for reading in readings:
        setattr(clock, name, reading)
        if trigger.due(clock):
            out.append(reading)
        clock.asked()
    return out


def test_every_is_due_at_its_multiples_and_never_at_zero():
    assert fired(Every(optim_steps=3), range(11)) == [3, 6, 9]
    assert fired(Every(optim_steps=1), range(4)) == [1, 2, 3]
    assert fired(Every(optim_steps=3), [0, 0, 0]) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_fires_on_crossing_where_the_clock_jumps(seed):
    draw = random.Random(seed)
    n, readings = draw.randint(2, 9), sorted(draw.randint(0, 60) for _ in range(20))
    boundaries = range(n, 100, n)
    expected = [
        now
        for before, now in itertools.pairwise([0, *readings])
        if any(before < boundary <= now for boundary in boundaries)
    ]
    assert fired(Every(optim_steps=n), readings) == expected


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("optim_steps", "step"),
        ("batches", "batches"),
        ("epochs", "epoch"),
        ("frames", "frames"),
        ("seconds", "seconds"),
    ],
)
def test_every_reads_its_own_scale(setting, name):
    trigger = Every(**{setting: 5})
    assert fired(trigger, [4, 5, 9, 12], name=name) == [5, 12]
    for other in {"step", "batches", "epoch", "frames", "seconds"} - {name}:
        assert fired(trigger, [4, 5, 9, 12], name=other) == []


def test_a_fraction_of_the_training():
    assert fired(Every(fraction=0.1, total_steps=50), range(51)) == list(range(5, 51, 5))
    frames = fired(Every(fraction=0.02, total_frames=100_000), range(0, 100_001, 500), name="frames")
    assert frames == list(range(2000, 100_001, 2000))
    assert 0.07 * 100 > 7  # a share is rarely exact, and still fires at the whole step
    assert fired(Every(fraction=0.07, total_steps=100), range(100)) == list(range(7, 100, 7))
    assert fired(Every(fraction=1 / 3, total_steps=100), range(101)) == [34, 67, 100]


def test_at_is_due_at_its_steps_zero_included():
    assert fired(At(0), [0, 0, 1]) == [0]
    assert fired(At(7, 0, 3), range(10)) == [0, 3, 7]
    assert fired(At(3, 4, 8), [0, 5, 6, 20]) == [5, 20]
    assert fired(At(2, of="epochs"), range(4), name="epoch") == [2]
    assert fired(At(2, of="epochs"), range(4)) == []
    assert At(3, 1) == At(1, 3)


def test_geometric_steps_are_evenly_spaced_in_log_step():
    assert Geometric(last=1000, n=4).steps == (1, 10, 100, 1000)
    assert Geometric(first=2, last=32, n=5).steps == (2, 4, 8, 16, 32)
    many = Geometric(last=1000, n=64).steps
    assert list(many) == sorted(set(many))
    assert (many[0], many[-1]) == (1, 1000)
    assert Geometric(first=5, last=5, n=3).steps == (5,)
    assert Geometric(first=5, last=9, n=1).steps == (5,)
    assert fired(Geometric(last=1000, n=4), [0, 1, 2, 9, 15, 99, 2000]) == [1, 15, 2000]
    assert fired(Geometric(last=100, n=3, of="frames"), [0, 64, 128], name="frames") == [64, 128]


def test_when_asks_its_function():
    assert fired(When(lambda clock: clock.step % 4 == 1), range(8)) == [1, 5]
    assert fired(When(lambda clock: clock.before is None), range(3)) == [0]


def test_either_and_both():
    assert fired(Every(optim_steps=4) | At(0, 5), range(9)) == [0, 4, 5, 8]
    assert fired(Every(optim_steps=2) & Every(optim_steps=3), range(13)) == [6, 12]
    assert fired((Every(optim_steps=2) & Every(optim_steps=3)) | At(0), range(13)) == [0, 6, 12]


TRIGGERS = [
    Every(optim_steps=7),
    Every(optim_steps=4) | At(0),
    At(0, 1, 13, 30),
    Geometric(last=60, n=9),
    Every(fraction=0.07, total_steps=60),
    Every(optim_steps=2) & Every(optim_steps=5),
    Every(frames=100) | At(0, of="frames"),
]


@pytest.mark.parametrize("trigger", TRIGGERS, ids=str)
@pytest.mark.parametrize("asked", [True, False], ids=["asked at the checkpoint", "advanced since it was asked"])
def test_the_same_steps_after_a_resume(trigger, asked):
    jumps = random.Random(0)
    steps = [0, *itertools.accumulate(jumps.randint(1, 3) for _ in range(30))]

    def run(clock, part, first_asked):
        out = []
        for i, step in enumerate(part):
            clock.step, clock.frames = step, 64 * step
            if i or not first_asked:
                if trigger.due(clock):
                    out.append(step)
                clock.asked()
        return out

    whole = run(Clock(), steps, False)
    for cut in range(len(steps)):
        clock = Clock()
        before = run(clock, steps[: cut + asked], False)
        clock.step, clock.frames = steps[cut], 64 * steps[cut]
        state = pickle.loads(pickle.dumps(clock.state_dict()))
        restored = Clock()
        restored.load_state_dict(state)
        assert restored == clock
        assert before + run(restored, steps[cut:], asked) == whole


def test_what_was_passed_before_a_checkpoint_does_not_fire_again():
    clock = Clock()
    assert fired(At(0, 5), range(6), clock=clock) == [0, 5]
    again = Clock()
    again.load_state_dict(clock.state_dict())
    assert fired(At(0, 5), range(5, 9), clock=again) == []


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Every(), "exactly one of optim_steps, batches, epochs, frames, seconds or fraction, got none"),
        (lambda: Every(optim_steps=1, frames=2), r"got \['optim_steps', 'frames'\]"),
        (lambda: Every(optim_steps=1, fraction=0.5, total_steps=9), "exactly one"),
        (lambda: Every(optim_steps=0), "positive period, got 0"),
        (lambda: Every(seconds=-1.0), "positive period, got -1"),
        (lambda: Every(frames=float("nan")), "positive period, got nan"),
        (lambda: Every(fraction=0.5), "needs one of total_frames=... and total_steps=..., and only it"),
        (lambda: Every(fraction=0.5, total_frames=1, total_steps=1), "and only it"),
        (lambda: Every(optim_steps=5, total_steps=10), "and only it"),
        (lambda: Every(optim_steps=5, total_frames=1, total_steps=10), "and only it"),
        (lambda: Every(fraction=1.5, total_steps=10), r"share of the training in \(0, 1\], got 1.5"),
        (lambda: Every(fraction=0, total_steps=10), r"share of the training in \(0, 1\], got 0"),
        (lambda: Every(fraction=0.5, total_steps=0), "positive period"),
        (lambda: At(), "At needs steps of 0 or more"),
        (lambda: At(3, -1), r"At needs steps of 0 or more, got \(3, -1\)"),
        (lambda: At(1, of="epoch"), "of='epoch' is no scale of a training; did you mean 'epochs'"),
        (lambda: Geometric(last=9, of="frame"), "did you mean 'frames'"),
        (lambda: Geometric(first=0, last=9), "0 < first <= last and n >= 1, got 0, 9, 64"),
        (lambda: Geometric(first=9, last=3), "0 < first <= last"),
        (lambda: Geometric(last=9, n=0), "n >= 1"),
    ],
)
def test_settings_are_refused_when_they_are_made(make, text):
    with pytest.raises(SettingsError, match=text):
        make()


@pytest.mark.parametrize("trigger", TRIGGERS, ids=str)
def test_triggers_pickle_and_compare(trigger):
    assert pickle.loads(pickle.dumps(trigger)) == trigger


def test_a_budget_allows_the_first_tick_and_then_what_keeps_within_the_share():
    budget = Budget(overhead=0.05)
    assert budget.allows(spent_s=0.0, next_s=0.0, training_s=0.0)
    assert not budget.allows(spent_s=1.0, next_s=1.0, training_s=39.9)
    assert budget.allows(spent_s=1.0, next_s=1.0, training_s=40.0)
    assert not budget.allows(spent_s=0.1, next_s=0.1, training_s=-1.0)
    for overhead in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(BudgetError, match=r"share of training time in \(0, 1\]"):
            Budget(overhead=overhead)
