"""What describes an artifact before its first row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from tdhook_train.buffer.retention import Retention
from tdhook_train.buffer.row import Key, as_key, show
from tdhook_train.errors import SettingsError

__all__ = ["Declaration", "Label", "plain"]

Label = str | int | float | bool
_RESERVED_DIMS = ("run", "step", "value")  # columns of a tidy table


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
        files: keys whose values are kept in a file of their own, a row each, since their shapes differ.
        retention: how many rows are kept, and which; None leaves it to the run.
        checksums: whether values are stored with checksums; None decides by the size of a row.
    """

    dims: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)
    coords: Mapping[str, list[Label]] = field(default_factory=dict)
    settings: Any = None
    legend: Mapping[Key, Mapping[int, str]] = field(default_factory=dict)
    files: tuple[Key, ...] = ()
    retention: Retention | None = None
    checksums: bool | None = None

    @classmethod
    def of(
        cls,
        dims: Mapping[Any, Iterable[str] | str],
        coords: Mapping[str, Iterable[Label]] | None,
        settings: Any = None,
        legend: Mapping[Any, Mapping[int, str]] | None = None,
        files: Iterable[str | tuple[str, ...]] = (),
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
            files=tuple(as_key(key) for key in files),
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
