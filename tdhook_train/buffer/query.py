"""Questions about the rows of an artifact, answered in step order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook_train.buffer import tables
from tdhook_train.buffer.row import Key, as_key, key_name, show
from tdhook_train.buffer.schema import Label, Schema
from tdhook_train.buffer.storage import GrowingMemmapStorage
from tdhook_train.errors import KeyMissingError, SettingsError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Queries"]

_STEP: Key = ("meta", "step")


class Queries:
    """What can be asked of an artifact.

    Answers are copies in step order, whatever the order of writing; rows of one step stand in the order they were
    written. While another process writes, each question is answered from the rows committed when it is asked.
    """

    _storage: GrowingMemmapStorage

    def refresh(self) -> None:
        """Take in what another process has written since."""
        self._storage.refresh()

    @property
    def schema(self) -> Schema:
        """Keys, shapes, dtypes and dimensions of every row."""
        return self._storage.schema

    @property
    def steps(self) -> Tensor:
        """The step of every row, int64."""
        return self._in_order()[0]

    def _in_order(self) -> tuple[Tensor, Tensor]:
        self.refresh()
        steps = self._storage.column(_STEP)
        if bool((steps[1:] >= steps[:-1]).all()):  # written in order, as nearly always
            return steps.clone(), torch.arange(len(steps), device="cpu")
        ordered = torch.sort(steps, stable=True)
        return ordered.values, ordered.indices

    def at(self, step: int) -> TensorDict:
        """Return the row of a step, the last written one where there are several.

        Raises:
            KeyMissingError: there is none; the message names the nearest steps.
        """
        steps, places = self._in_order()
        found = int(torch.searchsorted(steps, step, right=True)) - 1
        if found < 0 or int(steps[found]) != step:
            near = steps[max(found, 0) : found + 2].tolist()
            there = f"; the nearest are {' and '.join(map(str, near))}" if near else "; it has no rows yet"
            raise KeyMissingError(f"{self._storage.name!r} has no row of step {step}{there}")
        return self._storage.rows(places[found : found + 1])[0]

    def between(self, lo: int | None = None, hi: int | None = None) -> TensorDict:
        """Return the rows with ``lo <= step <= hi``, batch first; None leaves a side open."""
        steps, places = self._in_order()
        start = 0 if lo is None else int(torch.searchsorted(steps, lo))
        stop = len(steps) if hi is None else int(torch.searchsorted(steps, hi, right=True))
        return self._storage.rows(places[start : max(start, stop)])

    def first(self, n: int = 1) -> TensorDict:
        """Return the first ``n`` rows, or as many as there are, batch first."""
        return self._storage.rows(self._in_order()[1][: _count(n)])

    def last(self, n: int = 1) -> TensorDict:
        """Return the last ``n`` rows, or as many as there are, batch first."""
        places = self._in_order()[1]
        return self._storage.rows(places[max(0, len(places) - _count(n)) :])

    def series(self, key: str | tuple[str, ...]) -> Tensor:
        """Return one key over all steps, steps first; no other key is read but the steps.

        Raises:
            KeyMissingError: there is no such key.
        """
        places = self._in_order()[1]
        return self._storage.column(self._known(key))[: len(places)][places]

    def _known(self, key: str | tuple[str, ...]) -> Key:
        known = as_key(key)
        if known not in self.schema.columns:  # tables and pictures show keys with dots: take them back as well
            known = next((column for column in self.schema.columns if key_name(column) == key), known)
        if known not in self.schema.columns:
            hint = did_you_mean(key_name(known), map(key_name, self.schema.columns))
            raise KeyMissingError(f"{self._storage.name!r} has no key {show(known)!r}{hint}")
        return known

    def dims(self, key: str | tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of a key's dimensions, without the one of steps."""
        return self.schema.columns[self._known(key)].dims

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

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return tables.summary(self.between()) if key is None else self._tidy(self._known(key))

    def _tidy(self, key: Key) -> pd.DataFrame:
        steps, places = self._in_order()
        column, coords = self.schema.columns[key], self.schema.coords
        return tables.tidy(self._storage.column(key)[: len(places)][places], steps, column, coords)

    def to_xarray(self) -> xr.Dataset:
        """Return all rows with labelled dimensions, the steps as coordinate ``step``.

        Keys become dotted names. A dimension without labels whose size differs between keys becomes a dimension a key.

        Raises:
            MissingPackageError: xarray is not installed.
        """
        return tables.dataset(self.between(), self.schema)


def _count(n: int) -> int:
    if n < 0:
        raise SettingsError(f"n={n} rows were asked for, expected 0 or more")
    return n
