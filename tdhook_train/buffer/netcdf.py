"""Labelled arrays as NetCDF files, by whichever library for them there is."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdhook_train.buffer.tables import package
from tdhook_train.errors import MissingPackageError

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["engine", "write_dataset"]

_ENGINES = {"netCDF4": "netcdf4", "h5netcdf": "h5netcdf", "scipy": "scipy"}
_FINGERPRINTS = ("weights", "data")
_LARGEST = 2**31 - 1  # what scipy's NetCDF 3 has the room for


def engine() -> str:
    """Return the library that xarray is to write with.

    Raises:
        MissingPackageError: there is none.
    """
    for module, name in _ENGINES.items():
        if importlib.util.find_spec(module) is not None:
            return name
    raise MissingPackageError('writing NetCDF needs netCDF4, h5netcdf or scipy: pip install "tdhook-train[tables]"')


def write_dataset(dataset: xr.Dataset, path: Path) -> Path:
    """Write a dataset as any library reads it, all at once or not at all.

    Fingerprints become hexadecimal text; whole numbers are int32, or float64 where one is larger; half floats are
    float32; a complex variable becomes ``.real`` and ``.imag``. Names are kept, ``/`` replaced by ``_``.
    """
    xarray, chosen = package("xarray"), engine()
    variables = dict(pair for name in dataset.data_vars for pair in _plain(name, dataset[name].variable))
    coords = dict(pair for name in dataset.coords for pair in _plain(name, dataset[name].variable))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        xarray.Dataset(variables, coords, dataset.attrs).to_netcdf(temporary, engine=chosen)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _plain(name: Hashable, variable: Any) -> Iterator[tuple[str, Any]]:
    values, text = variable.values, str(name).replace("/", "_")
    dims = tuple(str(dim).replace("/", "_") for dim in variable.dims)
    if values.dtype.kind == "c":
        yield f"{text}.real", (dims, values.real)
        yield f"{text}.imag", (dims, values.imag)
    else:
        yield text, (dims, _as_text(values) if text in _FINGERPRINTS and dims == ("step",) else _fitting(values))


def _as_text(fingerprints: Any) -> Any:
    return package("numpy").array([f"{value & (2**64 - 1):#018x}" for value in fingerprints.tolist()], dtype=str)


def _fitting(values: Any) -> Any:
    numpy = package("numpy")
    if values.dtype.kind in "iub":
        wide = values.size and max(abs(int(values.max())), abs(int(values.min()))) > _LARGEST
        return values.astype("float64" if wide else "int32")
    if values.dtype.kind == "O":
        return numpy.array([str(value) for value in values.ravel()], dtype=str).reshape(values.shape)
    return values.astype("float32") if values.dtype == numpy.float16 else values
