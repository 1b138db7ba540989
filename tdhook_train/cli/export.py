"""``tdhook-train export``: rows for other programs."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdhook_train.cli.printing import complain, say
from tdhook_train.cli.runs import Run, opened
from tdhook_train.errors import KeyMissingError

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["EXAMPLES", "export"]

EXAMPLES = (
    "tdhook-train export runs/demo --to parquet",
    "tdhook-train export runs/demo --to csv --key probe/r2 --out tables",
    "tdhook-train export runs/demo --to netcdf --key probe",
)


class Format(StrEnum):
    """Kinds of files."""

    parquet = "parquet"
    csv = "csv"
    netcdf = "netcdf"


def export(
    run: Run,
    to: Annotated[Format, typer.Option(help="Kind of the files.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; RUN/export by default.", show_default=False)
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option(help="Only this ARTIFACT or ARTIFACT/KEY; may be repeated.", show_default=False)
    ] = None,
) -> None:
    """Write rows to files for other programs.

    Prints the path of each. parquet: a file an artifact, a line a row, arrays as lists; of an ARTIFACT/KEY a line a
    number. csv: a file a key, a line a number, with step and labels, and a file an artifact with what describes its
    rows. netcdf: a file an artifact, arrays with named dimensions and labels.
    """
    folder = run / "export" if out is None else out
    with opened(run) as buffer:
        chosen = _chosen(buffer, key or [])
        folder.mkdir(parents=True, exist_ok=True)
        for name, keys in chosen.items():
            artifact = buffer[name]
            if artifact.schema.files and not keys:
                complain(f"{name}: left out what is kept in files ({', '.join(map('.'.join, artifact.schema.files))})")
            for path in _WRITERS[to](artifact, name, keys, folder):
                say(path)


def _chosen(buffer: ArtifactBuffer, given: list[str]) -> dict[str, list[str]]:
    """Return the keys that are asked for, by artifact; none stands for all.

    Raises:
        KeyMissingError: an artifact or key is not there, or nothing is.
    """
    chosen: dict[str, list[str]] = {}
    for one in given:
        name, _, key = one.strip("/").partition("/")
        buffer[name]
        if key:
            buffer[name].dims(key.replace("/", "."))
        chosen[name] = [] if not key or chosen.get(name) == [] else [*chosen.get(name, ()), key.replace("/", ".")]
    chosen = chosen or {name: [] for name in buffer}
    if not chosen:
        raise KeyMissingError(f"{buffer.path} has no row to export yet")
    return chosen


def _parquet(artifact: Artifact, name: str, keys: list[str], folder: Path) -> Iterator[Path]:
    if not keys:
        yield artifact.to_parquet(folder / f"{name}.parquet")
    for key in keys:
        yield artifact.to_parquet(folder / f"{_file(name, key)}.parquet", key)


def _csv(artifact: Artifact, name: str, keys: list[str], folder: Path) -> Iterator[Path]:
    if not keys:
        yield _written(artifact.to_pandas(), folder / f"{name}.csv")
    arrays = [".".join(key) for key, column in artifact.schema.columns.items() if column.shape]
    for key in keys or arrays:
        yield _written(artifact.to_pandas(key), folder / f"{_file(name, key)}.csv")


def _netcdf(artifact: Artifact, name: str, keys: list[str], folder: Path) -> Iterator[Path]:
    from tdhook_train.buffer.netcdf import write_dataset

    of = f"{name}.{keys[0]}" if len(keys) == 1 else name
    yield write_dataset(artifact.to_xarray(keys or None), folder / f"{_file(of)}.nc")


def _written(table: object, path: Path) -> Path:
    from tdhook_train.ops.files import whole_file

    with whole_file(path) as partial:
        table.to_csv(partial, index=False)  # type: ignore[attr-defined]
    return path


def _file(*parts: str) -> str:
    from tdhook_train.buffer.row import file_part

    return file_part(parts)


_WRITERS = {Format.parquet: _parquet, Format.csv: _csv, Format.netcdf: _netcdf}
