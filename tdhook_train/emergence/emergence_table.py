"""When each series of an artifact emerged: a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tdhook_train.buffer.query import Queries
from tdhook_train.buffer.row import Key, as_key, show
from tdhook_train.buffer.tables import free, package
from tdhook_train.emergence.half_maximum import half_maximum
from tdhook_train.emergence.kinds import NEVER_BEAT, Direction, oriented, words
from tdhook_train.emergence.sigmoid_onset import sigmoid_onset
from tdhook_train.errors import KeyMissingError, SettingsError
from tdhook_train.ops.partition import long_run_variance, partition
from tdhook_train.ops.series import Array, array, by_ticks

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["emergence_table"]

_NOTHING = {"r2": 0.0, "r2_pooled": 0.0}  # what a constant reaches, by definition
_LUCK = 0.05  # how often a null that is beaten at 5 % is beaten at one tick


def emergence_table(
    artifact: Queries | Mapping[Any, Queries],
    key: str | tuple[str, ...] = "r2",
    *,
    null: str | tuple[str, ...] | None = "auto",
    direction: Direction = "rise",
    ticks: int | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Say of every series of a measurement, layer by layer and target by target, when it emerged.

    A series that never beats its null has no onset. It beats it where it lies beyond for several ticks running; ticks
    at which either is not finite are left out, and an R² (keys ``r2`` and ``r2_pooled``) must lie above 0 too, which a
    constant reaches. A series for which no null was computed at all keeps its onset, and the
    column ``null`` says so: whether it is more than chance is then not known.

    Args:
        artifact: what ``buffer["probe"]`` gives, also of merged runs; or several runs' by name, say by seed.
        key: the measurement, any number of dimensions.
        null: the key of what chance reaches, in the same shape: the measurement's name with ``_null`` behind it, where
            there is one; None leaves it out.
        direction: which way the measurement improves: ``"fall"`` of a loss.
        ticks: for how many ticks running the null must be beaten; by default at least 2, and as many as luck reaches
            in less than one series of twenty (3 of 21 to 400 ticks, 4 beyond) if ticks were independent.
        level: of the intervals.

    Returns:
        A row a series. ``run`` (of several), the key's dimensions, ``onset_half`` (:func:`half_maximum`),
        ``onset_sigmoid`` with its interval ``low``, ``high`` (:func:`sigmoid_onset`), ``start`` and ``plateau`` of the
        half-maximum, ``beats_null`` (from which step on, NaN for never), ``change_points`` (steps at which a new level
        begins, whatever the null, :func:`change_points`), ``null`` (``"beaten"``, ``"not beaten"``, ``"none"``),
        ``reason`` (why ``onset_half`` is missing) and ``reason_sigmoid``. Of rows of one step the last written counts.

    Raises:
        KeyMissingError: there is no such key.
        SettingsError: the key is kept in files, or its null has another shape.
        MissingPackageError: pandas is not installed.
    """
    pandas = package("pandas")
    if ticks is not None and ticks < 1:
        raise SettingsError(f"ticks={ticks} must be 1 or more")
    oriented(direction)
    tables = []
    for labels, source, rows in _runs(artifact):
        known = _series(source, key)
        beside = _null_key(source, as_key(key), null)
        found = _Found(*_newest(source, rows, known, beside, key), direction)
        columns = found.columns(ticks, level)
        dims = list(source.dims(key))
        coords = source.coords
        shape = known.shape[1:]
        places = np.indices(shape).reshape(len(dims), math.prod(shape))
        names = {
            free(dim, {*labels, *columns}): pandas.Index(coords[dim]).take(place)
            for dim, place in zip(dims, places, strict=True)
        }
        tables.append(pandas.DataFrame({**labels, **names, **columns}))
    return pandas.concat(tables, ignore_index=True)


def _runs(artifact: Any) -> Iterator[tuple[dict[str, Any], Queries, NDArray[np.bool_]]]:
    """Each run: its label, where it lies, and which of the rows there are its own."""
    if not isinstance(artifact, Mapping):
        yield from _merged({}, artifact)
        return
    if not artifact:
        raise SettingsError("there is no run to look at")
    for label, source in artifact.items():
        yield from _merged({"run": label}, source)


def _merged(labels: dict[str, Any], source: Queries) -> Iterator[tuple[dict[str, Any], Queries, NDArray[np.bool_]]]:
    if not source.runs:
        yield labels, source, np.ones(len(source.steps), dtype=bool)
        return
    own = source.series(("meta", "run")).numpy()
    for number, name in enumerate(source.runs):
        label = f"{labels['run']}/{name}" if labels else name
        yield {"run": label}, source, own == number


def _series(source: Queries, key: str | tuple[str, ...]) -> Array:
    values = source.series(key)
    if isinstance(values, list):
        raise SettingsError(f"{show(as_key(key))!r} is kept in files, which have no series of numbers")
    return array(values)


def _null_key(source: Queries, key: Key, null: Any) -> Any:
    if null != "auto":
        return null
    beside = (*key[:-1], f"{key[-1]}_null")
    try:
        source.dims(beside)
    except KeyMissingError:
        return None
    return beside


def _newest(
    source: Queries, rows: NDArray[np.bool_], values: Array, null: Any, key: Any
) -> tuple[Array, Array, Array | None]:
    """The steps of a run, its values and their null ``[tick, series]``: of rows of one step the last."""
    steps = source.steps.numpy()[rows].astype(np.float64)
    last = np.append(steps[1:] != steps[:-1], True)[: len(steps)]
    chance = None
    if null is not None:
        chance = _series(source, null)
        if chance.shape != values.shape:
            raise SettingsError(
                f"the null {show(as_key(null))!r} has shape {chance.shape[1:]} a tick, "
                f"{show(as_key(key))!r} {values.shape[1:]}"
            )
        chance = np.maximum(
            chance[rows][last].reshape(last.sum(), math.prod(values.shape[1:])), _NOTHING.get(as_key(key)[-1], -np.inf)
        )
    return steps[last], values[rows][last].reshape(last.sum(), math.prod(values.shape[1:])), chance


class _Found:
    """All that is found in the series ``[tick, series]`` of one run."""

    def __init__(self, steps: Array, values: Array, null: Array | None, direction: Direction) -> None:
        self.steps, self.values, self.null, self.direction = steps, values, null, direction

    def columns(self, ticks: int | None, level: float) -> dict[str, Any]:
        """Return the columns of the table."""
        half = half_maximum(self.steps, self.values, direction=self.direction)
        beaten, state = self._against_null(ticks)
        out = state == "not beaten"
        never = words(NEVER_BEAT, self.direction)
        columns = {
            "onset_half": np.where(out, np.nan, half.onset),
            **self._sigmoids(out | (half.reason != ""), level),
            "start": half.start,
            "plateau": half.plateau,
            "beats_null": beaten,
            "change_points": self._changes(),
            "null": state,
            "reason": np.where(out, never, half.reason),
        }
        sigmoid = np.where(columns["reason"] != "", columns["reason"], columns.pop("reason_sigmoid"))
        return {**columns, "reason_sigmoid": sigmoid}

    def _against_null(self, ticks: int | None) -> tuple[Array, NDArray[np.object_]]:
        """Return from which step on each series beats its null, and whether."""
        beaten = np.full(self.values.shape[1], np.nan)
        state = np.full(self.values.shape[1], "none", dtype=object)
        if self.null is None:
            return beaten, state
        gap = oriented(self.direction) * (self.values - self.null)
        for places, there in by_ticks(gap):
            if not (n := int(there.sum())):
                continue
            needed = ticks or max(2, 1 + int(np.ceil(np.log(n) / -np.log(_LUCK) - 1e-9)))
            above = (gap[np.ix_(there, places)] > 0).cumsum(0)
            above = np.concatenate([np.zeros((1, len(places)), dtype=above.dtype), above])
            runs = above[needed:] - above[:-needed] == needed if n >= needed else np.zeros((1, len(places)), dtype=bool)
            beats = runs.any(0)
            beaten[places] = np.where(beats, self.steps[there][runs.argmax(0)], np.nan)
            state[places] = np.where(beats, "beaten", "not beaten")
        return beaten, state

    def _sigmoids(self, out: NDArray[np.bool_], level: float) -> dict[str, Any]:
        """Fit the series that have an onset; the reason is left to give where the others have one already."""
        found = {name: np.full(len(out), np.nan) for name in ("onset_sigmoid", "low", "high")}
        found["reason_sigmoid"] = np.full(len(out), "", dtype=object)
        fitted = sigmoid_onset(self.steps, self.values[:, ~out], direction=self.direction, level=level)
        parts = (fitted.onset, fitted.low, fitted.high, fitted.reason)
        for name, part in zip(found, parts, strict=True):
            found[name][~out] = part
        return found

    def _changes(self) -> NDArray[np.object_]:
        """Return the steps at which new levels begin, a tuple a series."""
        changes = np.empty(self.values.shape[1], dtype=object)
        changes[:] = [()] * len(changes)
        finite = np.isfinite(self.values)
        counts = finite.sum(0)
        for n in np.unique(counts[counts > 1]):  # where the gaps are does not matter to levels
            places = np.flatnonzero(counts == n)
            values = self.values.T[places][finite.T[places]].reshape(len(places), n).T
            begins = partition(values, 3 * long_run_variance(values) * np.log(n))
            for place, begin in zip(places, begins.T, strict=True):
                changes[place] = tuple(self.steps[finite[:, place]][begin].astype(np.int64).tolist())
        return changes
