"""The step at which a measure is half of the way to where it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tdhook_train.emergence.kinds import ABSENT, Direction, given, oriented, words
from tdhook_train.ops.half_way import half_way
from tdhook_train.ops.series import array, by_ticks

__all__ = ["HalfMaximum", "half_maximum"]


@dataclass(frozen=True)
class HalfMaximum:
    """Floats and a text for one series; for several, arrays in the shape of the values without the steps.

    Args:
        onset: the step, NaN where there is none.
        start: the level before.
        plateau: the level that is reached.
        reason: why there is no onset, "" where there is one.
    """

    onset: Any
    start: Any
    plateau: Any
    reason: Any


def half_maximum(steps: Any, values: Any, *, from_: Any = None, direction: Direction = "rise") -> HalfMaximum:
    """Find the first crossing of half of the way from the start to the plateau, interpolated in ``log(1 + step)``.

    So step 0 counts as a step of its own, before step 1, and from ten steps on this is log-step to .05 decades. The
    start is the median of the first three ticks (the first alone where it stands apart from them), the plateau the
    highest mean over a fifth of the ticks, so that what is forgotten later was learned all the same. Crossings are
    looked for in a running median, which leaves monotone series as they are. What rises by less than three times the
    scatter between ticks has no onset: of white noise less than 1 % do, with 60 ticks or more, but of noise with an
    autocorrelation of .7 more than a quarter, which a null has to sort out (:func:`emergence_table`).

    On sigmoids that reach their plateau the median error is below .05 decades at a noise of a tenth of the rise.

    Args:
        steps: rising, one a tick.
        values: ``[tick]`` or ``[tick, ...]``; ticks that are not finite are left out, each from its own series.
        from_: the level to start from, one or one a series, instead of that of the first ticks: chance, or what an
            untrained network reaches.
        direction: which way the measure improves: ``"rise"``, or ``"fall"`` of a loss.

    Raises:
        SettingsError: steps do not rise, or are not as many as values.
    """
    sign = oriented(direction)
    steps, flat, shape = given(steps, values)
    levels = None if from_ is None else sign * np.broadcast_to(array(from_), shape).reshape(-1)
    out = np.full((3, flat.shape[1]), np.nan)
    codes = np.full(flat.shape[1], ABSENT)
    for places, ticks in by_ticks(flat):
        if ticks.any():
            found = half_way(
                steps[ticks], sign * flat[np.ix_(ticks, places)], None if levels is None else levels[places]
            )
            out[:, places] = found.onset, sign * found.start, sign * found.plateau
            codes[places] = found.code
    onset, start, plateau = (each.reshape(shape) if shape else float(each[0]) for each in out)
    return HalfMaximum(onset, start, plateau, words(codes.reshape(shape), direction))
