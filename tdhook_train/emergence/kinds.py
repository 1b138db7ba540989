"""What onsets have in common: which way a measure improves, and the words for why there is none."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from tdhook_train.errors import SettingsError
from tdhook_train.ops.half_way import BEYOND, FEW, FLAT, FOUND, NOT_UP, WITHIN
from tdhook_train.ops.series import Array, array, rising_steps

__all__ = ["ABSENT", "FEW_FOR_SIGMOID", "NEVER_BEAT", "OUTSIDE", "STUCK", "Direction", "given", "oriented", "words"]

Direction = Literal["rise", "fall"]

FEW_FOR_SIGMOID, STUCK, OUTSIDE, NEVER_BEAT, ABSENT = range(10, 15)
_REASONS = {
    FOUND: "",
    FEW: "fewer than 4 ticks: no {0} can be told from noise",
    FLAT: "constant",
    NOT_UP: "does not {0}",
    WITHIN: "{0}s by less than 3 times its scatter between ticks",
    BEYOND: "beyond half-way from the first step on",
    FEW_FOR_SIGMOID: "fewer than 6 ticks: nothing is left to tell a sigmoid's error",
    STUCK: "the fit of a sigmoid did not converge",
    OUTSIDE: "the sigmoid's middle lies outside the measured steps",
    NEVER_BEAT: "never beats its null",
    ABSENT: "no finite value",
}


def oriented(direction: Direction) -> float:
    """Return the sign that makes what improves rise."""
    if direction not in ("rise", "fall"):
        raise SettingsError(f"direction={direction!r} is no way to go; did you mean 'rise' or 'fall'?")
    return 1.0 if direction == "rise" else -1.0


def words(codes: Any, direction: Direction) -> Any:
    """Return the reasons that codes stand for: an array of texts, or one text."""
    told = np.vectorize(lambda code: _REASONS[int(code)].format(direction), otypes=[object])(codes)
    return told if told.ndim else told.item()


def given(steps: Any, values: Any) -> tuple[Array, Array, tuple[int, ...]]:
    """Return steps, values ``[tick, series]``, and the shape that answers have: that of the values but for the steps.

    Raises:
        SettingsError: the values have no ticks' dimension, or the steps do not rise.
    """
    found = array(values)
    if found.ndim == 0:
        raise SettingsError(f"values={found.item()!r} is one number, expected one a step, steps first")
    return rising_steps(steps, len(found)), found.reshape(len(found), math.prod(found.shape[1:])), found.shape[1:]
