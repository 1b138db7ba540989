"""Questions about the rows of an artifact, answered in step order."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.buffer import parquet, tables
from tdhook_train.buffer.declaration import Label
from tdhook_train.buffer.row import META, Key, as_key, key_name, show
from tdhook_train.buffer.schema import Schema
from tdhook_train.buffer.storage import GrowingMemmapStorage
from tdhook_train.errors import KeyMissingError, SchemaError, SettingsError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Queries"]

Keys = Sequence[str | tuple[str, ...]] | None
Condition = Callable[[Tensor], Tensor] | str | float | Tensor

_STEP: Key = ("meta", "step")
_RUN: Key = ("meta", "run")
_CHUNK_ROWS = 1024  # what is in memory at once while a file is written


class Queries:
    """What can be asked of an artifact.

    Answers are copies in step order, whatever the order of writing; rows of one step stand in the order they were
    written. Only the keys that are asked for are read. While another process writes, each question is answered from the
    rows committed when it is asked, less those that are replaced while it is answered.
    """

    _storage: GrowingMemmapStorage

    def refresh(self) -> None:
        """Take in what another process has written since."""
        self._storage.refresh()

    @property
    def runs(self) -> list[str]:
        """The labels of the merged runs, by the number in ``("meta", "run")``."""
        return []

    @property
    def schema(self) -> Schema:
        """Keys, shapes, dtypes and dimensions of every row."""
        return self._storage.schema

    @property
    def steps(self) -> Tensor:
        """The step of every row, int64."""
        return self._in_order()[0]

    def _in_order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the steps of all rows in order, with the places and words of the rows."""
        self.refresh()
        with self._storage.disk.lock:
            places, words = self._storage.disk.index()
            steps, still = self._storage.disk.column(_STEP, places, words)
        if not bool(still.all()):
            steps, places, words = steps[still], places[still], words[still]
        if bool((steps[1:] >= steps[:-1]).all()):  # written in order, as nearly always
            return steps, places, words
        ordered = torch.sort(steps, stable=True)
        return ordered.values, places[ordered.indices], words[ordered.indices]

    def at(self, step: int, keys: Keys = None) -> TensorDictBase:
        """Return the row of a step, the last written one where there are several.

        Raises:
            KeyMissingError: there is none; the message names the nearest steps.
        """
        step = _whole(step)
        steps, places, words = self._in_order()
        found = int(torch.searchsorted(steps, step, right=True)) - 1
        if found < 0 or int(steps[found]) != step:
            near = steps[max(found, 0) : found + 2].tolist()
            there = f"; the nearest are {' and '.join(map(str, near))}" if near else "; it has no rows yet"
            raise KeyMissingError(f"{self._storage.name!r} has no row of step {step}{there}")
        rows = self._table(places[found : found + 1], words[found : found + 1], keys)
        return rows[0] if len(rows) else self.at(step, keys)  # replaced while it was read

    def between(self, lo: int | None = None, hi: int | None = None, keys: Keys = None) -> TensorDictBase:
        """Return the rows with ``lo <= step <= hi``, batch first; None leaves a side open.

        Args:
            lo: the first step.
            hi: the last step.
            keys: what to read, for instance ``["r2", ("meta", "time")]``; None reads all.
        """
        steps, places, words = self._in_order()
        start = 0 if lo is None else int(torch.searchsorted(steps, _number(lo)))
        stop = len(steps) if hi is None else int(torch.searchsorted(steps, _number(hi), right=True))
        part = slice(start, max(start, stop))
        return self._table(places[part], words[part], keys)

    def first(self, n: int = 1, keys: Keys = None) -> TensorDictBase:
        """Return the first ``n`` rows, or as many as there are, batch first."""
        _, places, words = self._in_order()
        part = slice(_count(n))
        return self._table(places[part], words[part], keys)

    def last(self, n: int = 1, keys: Keys = None) -> TensorDictBase:
        """Return the last ``n`` rows, or as many as there are, batch first."""
        _, places, words = self._in_order()
        part = slice(max(0, len(places) - _count(n)), None)
        return self._table(places[part], words[part], keys)

    def where(self, key: str | tuple[str, ...], condition: Condition, keys: Keys = None) -> TensorDictBase:
        """Return the rows of which a condition holds, batch first; of the others only ``key`` is read.

        Args:
            key: what the condition is about.
            condition: a value to be equal to, or a function of the series of ``key`` (rows first) to one bool a row. A
                text stands for the number it labels: a reason of the legend, or the label of a merged run.
            keys: what to read; None reads all.

        Raises:
            SettingsError: the function gives something else, or the text labels nothing.

        Example:
            >>> rows = probe.where("r2", lambda r2: r2.amax((1, 2)) > 0.9)
            >>> rows = merged.where(("meta", "run"), "seed 3")
        """
        known = self._known(key)
        _, places, words = self._in_order()
        values, still = self._column(known, places, words)
        held = self._held(known, condition, values) & still
        return self._table(places[held], words[held], keys)

    def _held(self, key: Key, condition: Condition, values: Any) -> Tensor:
        if callable(condition):
            held = torch.as_tensor(condition(values), device="cpu")
            if held.dtype != torch.bool or held.shape != (len(values),):
                raise SettingsError(
                    f"the condition on {show(key)!r} gave {held.dtype} of shape {tuple(held.shape)}, "
                    f"expected one bool for each of {len(values)} rows"
                )
            return held
        if isinstance(condition, str):
            condition = self._code(key, condition)
        if not isinstance(condition, (int, float, complex, Tensor)) or not isinstance(values, Tensor):
            raise SettingsError(
                f"the condition on {show(key)!r} is {condition!r}, expected a function, or a value of a column"
            )
        return (values == condition).reshape(len(values), -1).all(1)

    def _code(self, key: Key, label: str) -> int:
        labels = dict(enumerate(self.runs)) if key == _RUN else self.schema.legend.get(key, {})
        for code, text in labels.items():
            if text == label:
                return code
        raise SettingsError(f"{label!r} labels no value of {show(key)!r}{did_you_mean(label, labels.values())}")

    def in_order(self, keys: Keys = None) -> Iterator[TensorDictBase]:
        """Return the rows one by one, in step order; each is read when it is its turn."""
        for part in self.in_parts(1, keys):
            yield from part.unbind(0)

    def in_parts(self, n: int, keys: Keys = None) -> Iterator[TensorDictBase]:
        """Return the rows in step order, ``n`` at a time; each part is read when it is its turn."""
        _, places, words = self._in_order()
        for at, of in zip(places.split(n), words.split(n), strict=True):
            yield self._table(at, of, keys)

    def series(self, key: str | tuple[str, ...]) -> Any:
        """Return one key over all steps, steps first: a tensor, or a list of what the files of a key hold.

        No other key is read but the steps.

        Raises:
            KeyMissingError: there is no such key.
        """
        known = self._known(key)
        _, places, words = self._in_order()
        return self._kept(known, places, words)

    def _kept(self, key: Key, places: Tensor, words: Tensor) -> Any:
        values, still = self._column(key, places, words)
        if isinstance(values, list):
            return [value for value, there in zip(values, still.tolist(), strict=True) if there]
        return values if bool(still.all()) else values[still]

    def _column(self, key: Key, places: Tensor, words: Tensor) -> tuple[Any, Tensor]:
        with self._storage.disk.lock:
            return self._storage.disk.column(key, places, words)

    def _table(self, places: Tensor, words: Tensor, keys: Keys) -> TensorDictBase:
        wanted = None if keys is None else [self._known(key) for key in keys]
        with self._storage.disk.lock:
            return self._storage.disk.table(places, words, wanted)

    def _known(self, key: str | tuple[str, ...]) -> Key:
        known, every = as_key(key), (*self.schema.columns, *self.schema.files)
        if known not in every:  # tables and pictures show keys with dots: take them back as well
            known = next((column for column in every if key_name(column) == key), known)
        if known not in every:
            hint = did_you_mean(key_name(known), map(key_name, every))
            raise KeyMissingError(f"{self._storage.name!r} has no key {show(known)!r}{hint}")
        return known

    def dims(self, key: str | tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of a key's dimensions, without the one of steps."""
        column = self.schema.columns.get(self._known(key))
        return () if column is None else column.dims  # what lies in files has no fixed dimensions

    @property
    def coords(self) -> dict[str, list[Label]]:
        """The labels of every dimension, a range where none were declared.

        Where two keys disagree on the size of an unlabelled dimension, the range is that of the longer one.
        """
        coords: dict[str, list[Label]] = {dim: list(labels) for dim, labels in self.schema.coords.items()}
        for column in self.schema.columns.values():
            for dim, size in zip(column.dims, column.shape, strict=True):
                if dim not in self.schema.coords and size >= len(coords.get(dim, ())):
                    coords[dim] = list(range(size))
        return coords

    @property
    def legend(self) -> dict[Any, dict[int, str]]:
        """What the codes of a key mean."""
        return {show(key): dict(codes) for key, codes in self.schema.legend.items()}

    @property
    def settings(self) -> Any:
        """What the artifact was made with."""
        return self.schema.settings

    def to_pandas(self, key: str | tuple[str, ...] | None = None) -> pd.DataFrame:
        """Return a table.

        Args:
            key: the key to lay out in tidy form, one line a number, with columns ``step``, the key's dimensions and
                ``value``; None gives one line a row, with the row's ``meta`` and every key that holds a single number.
                Of merged runs, a column ``run`` holds the label.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        if key is not None:
            return self._tidy(self._known(key))
        single = [key for key, column in self.schema.columns.items() if column.shape == ()]
        return tables.summary(self.between(keys=single), self.runs)

    def _tidy(self, key: Key) -> pd.DataFrame:
        if key not in self.schema.columns:
            raise SchemaError(f"{show(key)!r} of {self._storage.name!r} is kept in files, which have no fixed shape")
        rows = self.between(keys=[key, _STEP, _RUN])
        return tables.tidy(rows, self.schema.columns[key], self.schema.coords, self.runs)

    def to_xarray(self, keys: Keys = None) -> xr.Dataset:
        """Return all rows with labelled dimensions, the steps as coordinate ``step``.

        Keys become dotted names. A dimension without labels whose size differs between keys becomes a dimension a key.
        What is kept in files is left out.

        Args:
            keys: what to read; None reads all.

        Raises:
            MissingPackageError: xarray is not installed.
        """
        asked = self.schema.columns if keys is None else [*map(self._known, keys), *META]
        rows = self.between(keys=[key for key in asked if key in self.schema.columns])
        return tables.dataset(rows, self.schema, self.runs)

    def to_parquet(self, path: str | os.PathLike[str], key: str | tuple[str, ...] | None = None) -> Path:
        """Write a Parquet file, and return its path.

        Args:
            path: where to.
            key: the key to lay out as :meth:`to_pandas` does; None writes one line a row, with its ``meta`` and every
                key under dotted names, arrays as lists of their numbers, the last dimension fastest. Shapes, dimensions
                and labels stand in the file's metadata under ``tdhook_train``. Complex numbers become pairs, bfloat16
                becomes float32; what is kept in files is left out.

        Raises:
            MissingPackageError: pyarrow is not installed.
        """
        if key is not None:
            return parquet.write_table(self.to_pandas(key), Path(path))
        parts = self.in_parts(_CHUNK_ROWS, list(self.schema.columns))
        return parquet.write_rows(parts, self.schema, self.runs, Path(path))


def _number(step: float) -> float:
    if not isinstance(step, (int, float)):
        step = _whole(step)
    return step


def _whole(step: Any) -> int:
    try:
        return operator.index(step)
    except TypeError:
        raise SettingsError(f"step={step!r} is no whole number") from None


def _count(n: int) -> int:
    if n < 0:
        raise SettingsError(f"n={n} rows were asked for, expected 0 or more")
    return n
