"""Rows as tables and labelled arrays, for people who go on in pandas or xarray."""

from __future__ import annotations

import importlib
import json
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.buffer.declaration import Label
from tdhook_train.buffer.row import META, Key, key_name
from tdhook_train.buffer.schema import Column, Schema
from tdhook_train.errors import MissingPackageError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["array", "dataset", "free", "package", "summary", "tidy"]


def package(name: str) -> Any:
    """Return an optional package, or raise with its install line."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(f'{name} is not installed: pip install "tdhook-train[tables]"') from None


def array(value: Tensor) -> Any:
    """Return a value as numpy has it."""
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # numpy has no bfloat16


def _labels(column: Column, coords: Mapping[str, list[Label]]) -> list[list[Label]]:
    sizes = zip(column.dims, column.shape, strict=True)
    return [list(coords.get(dim, range(size))) for dim, size in sizes]


def tidy(rows: TensorDictBase, column: Column, coords: Mapping[str, list[Label]], runs: Sequence[str]) -> pd.DataFrame:
    """Return one key with one line a number: ``run`` (of merged runs), ``step``, the dimensions, ``value``."""
    pandas = package("pandas")
    numpy = package("numpy")
    values = rows[column.key]
    names = ["step", *column.dims]
    axes = [rows["meta", "step"].tolist(), *_labels(column, coords)]
    places = numpy.indices(values.shape).reshape(len(names), -1)
    table = {name: pandas.Index(axis).take(place) for name, axis, place in zip(names, axes, places, strict=True)}
    if runs:
        table = {"run": _run_labels(rows, runs).take(places[0]), **table}
    return pandas.DataFrame({**table, "value": array(values).reshape(-1)})


def _run_labels(rows: TensorDictBase, runs: Sequence[str]) -> Any:
    return package("pandas").Index(runs).take(array(rows["meta", "run"]))


def summary(rows: TensorDictBase, runs: Sequence[str]) -> pd.DataFrame:
    """Return one line a row: its meta, under plain names, and every key that holds a single number."""
    pandas = package("pandas")
    table = {key[1]: array(rows[key]) for key in META}
    if runs:
        table["run"] = _run_labels(rows, runs)
    else:
        del table["run"]
    for key, value in _items(rows):
        if value.ndim == 1 and key not in META:
            table[free(key_name(key), table)] = array(value)
    return pandas.DataFrame(table)


def dataset(rows: TensorDictBase, schema: Schema, runs: Sequence[str]) -> xr.Dataset:
    """Return every key as a labelled variable, the meta as coordinates along ``step``."""
    xarray = package("xarray")
    sizes: dict[str, int] = {}
    columns = {key: schema.columns[key] for key, _ in _items(rows)}
    for column in columns.values():
        for dim, size in zip(column.dims, column.shape, strict=True):
            sizes[dim] = size if sizes.get(dim, size) == size else -1
    coords: dict[str, Any] = {dim: labels for dim, labels in schema.coords.items() if dim in sizes}
    coords["step"] = array(rows["meta", "step"])
    for key in META:
        if key[1] not in ("step", "run"):
            coords[free(key[1], sizes)] = ("step", array(rows[key]))
    if runs:
        coords[free("run", sizes)] = ("step", _run_labels(rows, runs))
    values: dict[str, Any] = {}
    for key, value in _items(rows):
        if key not in META:
            dims = [dim if sizes[dim] >= 0 else f"{key_name(key)}.{dim}" for dim in columns[key].dims]
            values[free(key_name(key), {*coords, *values})] = (("step", *dims), array(value))
    legend = {key_name(key): codes for key, codes in schema.legend.items()}
    attrs = {"settings": json.dumps(schema.settings), "legend": json.dumps(legend)}
    result: xr.Dataset = xarray.Dataset(values, coords, attrs)
    return result


def _items(rows: TensorDictBase) -> list[tuple[Key, Tensor]]:
    items = rows.items(include_nested=True, leaves_only=True)
    return [((key,) if isinstance(key, str) else key, value) for key, value in items]


def free(name: str, taken: Container[str]) -> str:
    """Return a name that is not taken yet."""
    while name in taken:
        name = f"artifact.{name}"
    return name
