"""What the rows of an artifact look like: keys, shapes, dtypes, dimensions and their labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from tdhook_train.buffer.row import META, Key, Row, as_key, key_name, show
from tdhook_train.errors import SchemaError, SettingsError, did_you_mean

__all__ = ["Column", "Declaration", "Label", "Schema", "plain"]

Label = str | int | float | bool
_RESERVED_DIMS = ("step", "value")  # columns of a tidy table


def plain(value: Any, where: str) -> Any:
    """Return ``value`` as JSON gives it back: functions by qualified name, paths and dtypes as text."""
    try:
        return json.loads(json.dumps(value, default=_plain_leaf))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{where} cannot be written as JSON: {error}") from None


def _plain_leaf(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (torch.dtype, torch.device, PurePath)):
        return str(value)
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Callable) and hasattr(value, "__qualname__"):  # type: ignore[arg-type]
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"a {type(value).__name__} is no plain value")


@dataclass(frozen=True)
class Declaration:
    """What describes an artifact before its first row.

    Args:
        dims: names of a key's dimensions; a last name ``"*x"`` stands for all that remain.
        coords: labels of a dimension.
        settings: what the artifact was made with, as JSON.
        legend: what the codes of a key mean.
    """

    dims: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)
    coords: Mapping[str, list[Label]] = field(default_factory=dict)
    settings: Any = None
    legend: Mapping[Key, Mapping[int, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        dims: Mapping[Any, Iterable[str] | str],
        coords: Mapping[str, Iterable[Label]] | None,
        settings: Any = None,
        legend: Mapping[Any, Mapping[int, str]] | None = None,
    ) -> Declaration:
        """Build one from what a user writes.

        Raises:
            SettingsError: a name is used twice or reserved, or a value cannot be written as JSON.
        """
        return cls(
            dims={as_key(key): _dim_names(as_key(key), names) for key, names in dims.items()},
            coords={dim: plain(list(labels), f"coords of {dim!r}") for dim, labels in (coords or {}).items()},
            settings=plain(settings, "settings"),
            legend={as_key(key): {int(c): str(r) for c, r in codes.items()} for key, codes in (legend or {}).items()},
        )


def _dim_names(key: Key, names: Iterable[str] | str) -> tuple[str, ...]:
    dims = tuple(names.split()) if isinstance(names, str) else tuple(names)
    if len(set(dims)) < len(dims):
        raise SettingsError(f"dims of {show(key)!r}: {dims} names a dimension twice")
    for dim in dims:
        if dim in _RESERVED_DIMS:
            raise SettingsError(f"dims of {show(key)!r}: {dim!r} is taken by the tables; use another name")
        if dim.startswith("*") and dim is not dims[-1]:
            raise SettingsError(f"dims of {show(key)!r}: only the last of {dims} may begin with a star")
    return dims


@dataclass(frozen=True)
class Column:
    """One key of an artifact: the shape, without rows, and what its dimensions are called."""

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype
    dims: tuple[str, ...]

    @classmethod
    def of(cls, key: Key, value: Tensor, dims: tuple[str, ...] | None) -> Column:
        """Build one from the first value of a key."""
        return cls(key, tuple(value.shape), value.dtype, _expand(key, tuple(value.shape), dims))


def _expand(key: Key, shape: tuple[int, ...], dims: tuple[str, ...] | None) -> tuple[str, ...]:
    if dims is None:
        return tuple(f"dim_{i}" for i in range(len(shape)))
    if dims and dims[-1].startswith("*"):
        rest = len(shape) - len(dims) + 1
        name = dims[-1][1:]
        dims = dims[:-1] + ((name,) if rest == 1 else tuple(f"{name}_{i}" for i in range(rest)))
    if len(dims) != len(shape):
        raise SchemaError(f"key {show(key)!r} has shape {shape}, which dims {dims} do not fit")
    return dims


@dataclass(frozen=True)
class Schema:
    """What every row of an artifact has to look like, and what its axes mean."""

    columns: Mapping[Key, Column]
    coords: Mapping[str, list[Label]]
    settings: Any
    legend: Mapping[Key, Mapping[int, str]]

    @classmethod
    def of(cls, row: Mapping[Key, Tensor], declared: Declaration) -> Schema:
        """Build the schema that a first row and its declaration fix; the columns of ``meta`` are added.

        Raises:
            SchemaError: the row does not fit what was declared.
        """
        for key in (*declared.dims, *declared.legend):
            if key not in row:
                hint = did_you_mean(key_name(key), map(key_name, row))
                raise SchemaError(f"key {show(key)!r} was declared, but the first row has none{hint}")
        columns = {key: Column.of(key, value, declared.dims.get(key)) for key, value in row.items()}
        for key in columns:
            if any(key[:n] in columns for n in range(1, len(key))):
                raise SchemaError(f"key {show(key)!r} lies below a key that holds a tensor")
        columns |= {key: Column(key, (), dtype, ()) for key, dtype in META.items()}
        schema = cls(columns, declared.coords, declared.settings, declared.legend)
        schema._check_labels()
        return schema

    def _check_labels(self) -> None:
        for key, column in self.columns.items():
            for dim, size in zip(column.dims, column.shape, strict=True):
                if dim in self.coords and len(self.coords[dim]) != size:
                    raise SchemaError(
                        f"key {show(key)!r} has {size} entries along {dim!r}, expected {len(self.coords[dim])}, "
                        "one for each label"
                    )

    def check(self, row: Row, *, of: str = "row", batched: bool = False) -> None:
        """Refuse a row that differs.

        Args:
            row: tensors, or plain numbers for scalars, by key.
            of: what the row belongs to, for the message.
            batched: the first dimension of each tensor counts rows.

        Raises:
            SchemaError: naming the keys that differ, what was given and what was expected.
        """
        wrong = [text for key, value in row.items() if (text := self._difference(key, value, batched))]
        wrong += [f"key {show(key)!r} is missing" for key in self.columns if key not in row]
        if wrong:
            raise SchemaError(f"{of}: {'; '.join(wrong[:5])}{'; …' if len(wrong) > 5 else ''}")

    def _difference(self, key: Key, value: Tensor | float, batched: bool) -> str:
        column = self.columns.get(key)
        if column is None:
            return f"key {show(key)!r} is extra{did_you_mean(key_name(key), map(key_name, self.columns))}"
        if not isinstance(value, Tensor):
            return "" if column.shape == () else f"key {show(key)!r} is a number, expected shape {column.shape}"
        shape = value.shape[1:] if batched else value.shape
        if shape != column.shape:
            return f"key {show(key)!r} has shape {tuple(shape)}, expected {column.shape}"
        if value.dtype != column.dtype:
            return f"key {show(key)!r} has dtype {value.dtype}, expected {column.dtype}"
        return ""

    def check_declaration(self, declared: Declaration, *, of: str) -> None:
        """Refuse a declaration under which the rows stored so far would mean something else.

        Raises:
            SchemaError: naming what differs, what was given and what is stored.
        """
        for key, dims in declared.dims.items():
            column = self.columns.get(key)
            if column is None:
                raise SchemaError(f"{of}: key {show(key)!r} is declared, but not among {_keys(self.columns)}")
            if (given := _expand(key, column.shape, dims)) != column.dims:
                raise SchemaError(f"{of}: dims of {show(key)!r} are {given}, expected {column.dims} as stored")
        for what in ("coords", "settings", "legend"):
            given, stored = getattr(declared, what), getattr(self, what)
            if given != stored and _text(given) != _text(stored):  # a NaN is unlike itself
                raise SchemaError(f"{of}: {what} differ: {_first_difference(given, stored)}")

    def to_json(self) -> dict[str, Any]:
        """Return the schema as plain JSON values."""
        return {
            "columns": [
                {"key": list(c.key), "shape": list(c.shape), "dtype": str(c.dtype)[6:], "dims": list(c.dims)}
                for c in self.columns.values()
            ],
            "coords": {dim: list(labels) for dim, labels in self.coords.items()},
            "settings": self.settings,
            "legend": [
                {"key": list(key), "codes": {str(code): reason for code, reason in codes.items()}}
                for key, codes in self.legend.items()
            ],
        }

    @classmethod
    def from_json(cls, text: Mapping[str, Any]) -> Schema:
        """Build the schema that :meth:`to_json` wrote."""
        columns = (
            Column(tuple(c["key"]), tuple(c["shape"]), getattr(torch, c["dtype"]), tuple(c["dims"]))
            for c in text["columns"]
        )
        return cls(
            columns={column.key: column for column in columns},
            coords=dict(text["coords"]),
            settings=text["settings"],
            legend={tuple(e["key"]): {int(c): r for c, r in e["codes"].items()} for e in text["legend"]},
        )


def _text(value: Any) -> str:
    return repr(sorted(value.items(), key=str)) if isinstance(value, Mapping) else repr(value)


def _keys(columns: Iterable[Key]) -> str:
    return ", ".join(repr(show(key)) for key in columns if key not in META)


def _first_difference(given: Any, stored: Any) -> str:
    if isinstance(given, Mapping) and isinstance(stored, Mapping):
        for key in (*given, *stored):
            if _text(given.get(key)) != _text(stored.get(key)):
                return f"{key!r} is {given.get(key)!r}, expected {stored.get(key)!r} as stored"
    return f"{given!r}, expected {stored!r} as stored"
