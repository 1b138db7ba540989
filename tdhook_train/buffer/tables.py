"""Rows as tables and labelled arrays, for people who go on in pandas or xarray."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook_train.buffer.row import META, Key, key_name
from tdhook_train.buffer.schema import Column, Label, Schema
from tdhook_train.errors import MissingPackageError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["dataset", "summary", "tidy"]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(f'{name} is not installed: pip install "tdhook-train[plots]"') from None


def _array(value: Tensor) -> Any:
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # numpy has no bfloat16


def _labels(column: Column, coords: Mapping[str, list[Label]]) -> list[list[Label]]:
    sizes = zip(column.dims, column.shape, strict=True)
    return [list(coords.get(dim, range(size))) for dim, size in sizes]


def tidy(values: Tensor, steps: Tensor, column: Column, coords: Mapping[str, list[Label]]) -> pd.DataFrame:
    """Return one key with one line a number: ``step``, the dimensions, ``value``."""
    pandas = _package("pandas")
    numpy = _package("numpy")
    names = ["step", *column.dims]
    axes = [steps.tolist(), *_labels(column, coords)]
    places = numpy.indices(values.shape).reshape(len(names), -1)
    table = {name: pandas.Index(axis).take(place) for name, axis, place in zip(names, axes, places, strict=True)}
    return pandas.DataFrame({**table, "value": _array(values).reshape(-1)})


def summary(rows: TensorDict) -> pd.DataFrame:
    """Return one line a row: its meta, under plain names, and every key that holds a single number."""
    pandas = _package("pandas")
    table = {key[1]: _array(rows[key]) for key in META}
    for key, value in _items(rows):
        if value.ndim == 1 and key not in META:
            table[_free(key_name(key), table)] = _array(value)
    return pandas.DataFrame(table)


def dataset(rows: TensorDict, schema: Schema) -> xr.Dataset:
    """Return every key as a labelled variable, the meta as coordinates along ``step``."""
    xarray = _package("xarray")
    sizes: dict[str, int] = {}
    for column in schema.columns.values():
        for dim, size in zip(column.dims, column.shape, strict=True):
            sizes[dim] = size if sizes.get(dim, size) == size else -1
    coords: dict[str, Any] = {dim: labels for dim, labels in schema.coords.items() if dim in sizes}
    coords["step"] = _array(rows["meta", "step"])
    for key in META:
        if key[1] != "step":
            coords[_free(key[1], sizes)] = ("step", _array(rows[key]))
    values = {}
    for key, value in _items(rows):
        if key not in META:
            dims = [dim if sizes[dim] >= 0 else f"{key_name(key)}.{dim}" for dim in schema.columns[key].dims]
            values[_free(key_name(key), coords)] = (("step", *dims), _array(value))
    legend = {key_name(key): codes for key, codes in schema.legend.items()}
    attrs = {"settings": json.dumps(schema.settings), "legend": json.dumps(legend)}
    result: xr.Dataset = xarray.Dataset(values, coords, attrs)
    return result


def _items(rows: TensorDict) -> list[tuple[Key, Tensor]]:
    items = rows.items(include_nested=True, leaves_only=True)
    return [((key,) if isinstance(key, str) else key, value) for key, value in items]


def _free(name: str, taken: Mapping[str, Any]) -> str:
    return f"artifact.{name}" if name in taken else name
