"""What the rows of an artifact look like: keys, shapes, dtypes, dimensions and their labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdhook_train.buffer.declaration import Declaration, Label
from tdhook_train.buffer.row import META, Key, Value, key_name, show
from tdhook_train.errors import SchemaError, did_you_mean

__all__ = ["Column", "Schema"]


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
    files: tuple[Key, ...] = ()

    @classmethod
    def of(cls, row: Mapping[Key, Value], declared: Declaration) -> Schema:
        """Build the schema that a first row and its declaration fix; the columns of ``meta`` are added.

        A key that holds bytes is kept in files, declared or not.

        Raises:
            SchemaError: the row does not fit what was declared.
        """
        for key in (*declared.dims, *declared.legend, *declared.files):
            if key not in row:
                hint = did_you_mean(key_name(key), map(key_name, row))
                raise SchemaError(f"key {show(key)!r} was declared, but the first row has none{hint}")
        files = tuple(key for key, value in row.items() if key in declared.files or isinstance(value, bytes))
        columns = {
            key: Column.of(key, value, declared.dims.get(key))
            for key, value in row.items()
            if isinstance(value, Tensor) and key not in files
        }
        for key in row:
            if any(key[:n] in row for n in range(1, len(key))):
                raise SchemaError(f"key {show(key)!r} lies below a key that holds a tensor")
        columns |= {key: Column(key, (), dtype, ()) for key, dtype in META.items()}
        schema = cls(columns, declared.coords, declared.settings, declared.legend, files)
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

    @property
    def row_bytes(self) -> int:
        """What a row's values take up, without those kept in files."""
        return sum(torch.Size(c.shape).numel() * c.dtype.itemsize for c in self.columns.values())

    def check(self, row: Mapping[Key, Value], *, of: str = "row", batched: bool = False, meta: bool = True) -> None:
        """Refuse a row that differs.

        Args:
            row: values by key.
            of: what the row belongs to, for the message.
            batched: the first dimension of each tensor counts rows.
            meta: whether the row holds its meta.

        Raises:
            SchemaError: naming the keys that differ, what was given and what was expected.
        """
        wrong = [text for key, value in row.items() if (text := self._difference(key, value, batched))]
        expected = [key for key in (*self.columns, *self.files) if meta or key not in META]
        wrong += [f"key {show(key)!r} is missing" for key in expected if key not in row]
        if wrong:
            raise SchemaError(f"{of}: {'; '.join(wrong[:5])}{'; …' if len(wrong) > 5 else ''}")

    def _difference(self, key: Key, value: Value, batched: bool) -> str:
        column = self.columns.get(key)
        if column is None:
            if key in self.files:
                return ""
            known = map(key_name, (*self.columns, *self.files))
            return f"key {show(key)!r} is extra{did_you_mean(key_name(key), known)}"
        if not isinstance(value, Tensor):
            return f"key {show(key)!r} holds {type(value).__name__}, expected a tensor of shape {column.shape}"
        shape = value.shape[1:] if batched else value.shape
        if shape != column.shape:
            return f"key {show(key)!r} has shape {tuple(shape)}, expected {column.shape}"
        if value.dtype != column.dtype:
            return f"key {show(key)!r} has dtype {value.dtype}, expected {column.dtype}"
        return ""

    def check_same(self, other: Schema) -> None:
        """Refuse another schema.

        Raises:
            SchemaError: naming what differs.
        """
        for key in (*self.columns, *self.files, *other.columns, *other.files):
            mine, given = self.columns.get(key), other.columns.get(key)
            if mine != given or (key in self.files) != (key in other.files):
                raise SchemaError(
                    f"key {show(key)!r} is {_column(self, key)} in one and {_column(other, key)} in the other"
                )
        for what in ("coords", "settings", "legend"):
            mine, given = getattr(self, what), getattr(other, what)
            if _text(mine) != _text(given):
                raise SchemaError(f"{what} differ: {_first_difference(given, mine)}")

    def check_declaration(self, declared: Declaration, about: Iterable[str], *, of: str) -> None:
        """Refuse a declaration under which the rows stored so far would mean something else.

        Args:
            declared: the declaration.
            about: which of coords, settings and legend it says something about.
            of: what it is about, for the message.

        Raises:
            SchemaError: naming what differs, what was given and what is stored.
        """
        for key, dims in declared.dims.items():
            column = self.columns.get(key)
            if column is None:
                raise SchemaError(f"{of}: key {show(key)!r} is declared, but not among {_keys(self.columns)}")
            if (given := _expand(key, column.shape, dims)) != column.dims:
                raise SchemaError(f"{of}: dims of {show(key)!r} are {given}, expected {column.dims} as stored")
        if not set(declared.files) <= set(self.files):  # those of bytes need no declaration
            raise SchemaError(
                f"{of}: files are {_keys(declared.files)}, expected {_keys(self.files) or 'none'} as stored"
            )
        for what in about:
            now, stored = getattr(declared, what), getattr(self, what)
            if now != stored and _text(now) != _text(stored):  # a NaN is unlike itself
                raise SchemaError(f"{of}: {what} differ: {_first_difference(now, stored)}")

    def to_json(self) -> dict[str, Any]:
        """Return the schema as plain JSON values."""
        return {
            "columns": [
                {"key": list(c.key), "shape": list(c.shape), "dtype": str(c.dtype)[6:], "dims": list(c.dims)}
                for c in self.columns.values()
            ],
            "files": [list(key) for key in self.files],
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
            files=tuple(tuple(key) for key in text["files"]),
        )


def _column(schema: Schema, key: Key) -> str:
    if key in schema.files:
        return "kept in files"
    column = schema.columns.get(key)
    return "missing" if column is None else f"{str(column.dtype)[6:]} of shape {column.shape} with dims {column.dims}"


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
