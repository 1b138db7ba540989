"""Rows as Parquet files, for people who go on in other languages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.buffer.row import META, Key, key_name
from tdhook_train.buffer.schema import Schema
from tdhook_train.buffer.tables import array, free, package

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["write_rows", "write_table"]


def write_table(table: pd.DataFrame, path: Path) -> Path:
    """Write a table, all at once or not at all."""
    arrow = package("pyarrow")
    # not Table.from_pandas, which makes nulls of NaNs
    columns: dict[str, Any] = {}
    for name in table:
        values = table[name].to_numpy()
        parts = (
            {f"{name}.real": values.real, f"{name}.imag": values.imag} if values.dtype.kind == "c" else {name: values}
        )
        columns |= {part: arrow.array(each) for part, each in parts.items()}
    return _write([arrow.table(columns)], path)


def write_rows(parts: Iterable[TensorDictBase], schema: Schema, runs: Sequence[str], path: Path) -> Path:
    """Write rows, one line each, a group of lines a part."""
    arrow = package("pyarrow")
    described = json.dumps({"runs": list(runs), **schema.to_json()})
    tables = (
        arrow.table({name: _cells(part[key]) for key, name in _names(schema).items()}).replace_schema_metadata(
            {"tdhook_train": described}
        )
        for part in parts
    )
    return _write(tables, path)


def _names(schema: Schema) -> dict[Key, str]:
    names = {key: key_name(key) for key in META}  # which keep their names, whatever keys of the user read alike
    for key in schema.columns:
        if key not in META:
            names[key] = free(key_name(key), names.values())
    return {key: names[key] for key in schema.columns}


def _cells(values: Tensor) -> Any:
    arrow = package("pyarrow")
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    flat = arrow.array(array(values).reshape(-1))
    if values.ndim == 1:
        return flat
    size = values[0].numel() if len(values) else 0
    offsets = arrow.array([size * i for i in range(len(values) + 1)], arrow.int64())
    return arrow.LargeListArray.from_arrays(offsets, flat)


def _write(tables: Iterable[Any], path: Path) -> Path:
    parquet = package("pyarrow.parquet")
    temporary, writer = path.with_name(f".{path.name}.{os.getpid()}.tmp"), None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for table in tables:
            writer = writer or parquet.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
