"""Reading columns of a run's buffer as labelled arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tdhook_train.plots.panels import Array, Mark

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["Key", "Table", "all_holding", "columns", "holding", "marks", "read", "read_like", "recorded"]

Key: TypeAlias = str | tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Table:
    """One column of an artifact over training.

    Args:
        steps: ``[steps]``, ascending, each once.
        values: ``[steps, *dims]``.
        dims: what each further dimension counts, without a network's name: ``layer``, ``target`` …
        labels: the labels of each dimension, and of what runs parallel to one (``layer_type``).
    """

    steps: NDArray[np.int64]
    values: Array
    dims: tuple[str, ...]
    labels: dict[str, list[str]]

    def pick(self, dim: str, label: str) -> Table:
        """Return the table at one label of ``dim``, which it no longer has; itself where it has no such dimension."""
        if dim not in self.dims:
            return self
        axis = self.dims.index(dim)
        values = np.moveaxis(self.values, axis + 1, 0)[self.labels[dim].index(label)]
        return replace(self, values=values, dims=self.dims[:axis] + self.dims[axis + 1 :])

    def like(self, other: Table) -> Array:
        """Return the values at the steps of ``other``, spread over those of its dimensions that this table lacks.

        NaN at steps that this table does not have: the two may come from artifacts of different schedules, or from
        moments before and after a row that another process wrote.
        """
        places = np.searchsorted(self.steps, other.steps).clip(max=len(self.steps) - 1)
        values = self.values[places]
        values[self.steps[places] != other.steps] = np.nan
        missing = tuple(axis + 1 for axis, dim in enumerate(other.dims) if dim not in self.dims)
        return np.broadcast_to(np.expand_dims(values, missing), other.values.shape)

    def layer_types(self, chosen: list[int]) -> list[str] | None:
        """Return the module classes of the layers at ``chosen``, or None where they were not recorded."""
        types = self.labels.get("layer_type", [])
        return [types[position] for position in chosen] if len(types) == len(self.labels.get("layer", [])) else None


def recorded(buffer: ArtifactBuffer) -> Iterator[tuple[str, Artifact]]:
    """Yield the artifacts that have at least one row, by name."""
    for name in buffer:
        artifact = buffer[name]
        if len(artifact):
            yield name, artifact


def columns(artifact: Artifact) -> list[tuple[str, ...]]:
    """Return the keys of an artifact's own columns, without what describes a row."""
    return [key for key in artifact.schema.columns if key[0] != "meta"]


def holding(buffer: ArtifactBuffer, key: str) -> Artifact | None:
    """Return the first artifact with rows that has a column ``key`` over layers, whatever the run called it."""
    return next(iter(all_holding(buffer, key).values()), None)


def all_holding(buffer: ArtifactBuffer, key: str) -> dict[str, Artifact]:
    """Return the artifacts with rows that have a column ``key`` over layers, by name."""
    known = {name: artifact for name, artifact in recorded(buffer) if (key,) in columns(artifact)}
    return {name: artifact for name, artifact in known.items() if "layer" in artifact.dims(key)}


def read_like(artifact: Artifact, key: str, other: Table) -> Array:
    """Return a column in the shape of ``other``; NaN where the artifact has no such column."""
    if (key,) not in columns(artifact):
        return np.full(other.values.shape, np.nan)
    return read(artifact, key).like(other)


def read(artifact: Artifact, key: Key) -> Table:
    """Return a column as float64; of several rows of one step the last written counts."""
    steps = np.asarray(artifact.steps)
    _, last = np.unique(steps[::-1], return_index=True)
    rows = steps.size - 1 - last
    values = artifact.series(key)[rows].double().numpy()
    named = {dim.rsplit(".", 1)[-1]: _labels(artifact, dim, size) for dim, size in _sized(artifact, key, values)}
    dims = tuple(named)
    if "layer" in dims and "layer_type" in artifact.coords:
        named["layer_type"] = [str(kind) for kind in artifact.coords["layer_type"]]
    return Table(steps[rows], values, dims, named)


def _sized(artifact: Artifact, key: Key, values: Array) -> Iterator[tuple[str, int]]:
    return zip(artifact.dims(key), values.shape[1:], strict=True)


def _labels(artifact: Artifact, dim: str, size: int) -> list[str]:
    coords = artifact.coords
    return [str(label) for label in (coords[dim] if dim in coords else range(size))]


def marks(buffer: ArtifactBuffer) -> tuple[Mark, ...]:
    """Return what ``observer.mark`` noted during the run."""
    return tuple(Mark(int(event["step"]), _text(event)) for event in buffer.events("mark") if "step" in event)


def _text(event: dict[str, Any]) -> str:
    known = (event.get(name) for name in ("label", "text", "name", "message"))
    return str(next((text for text in known if text), "mark"))
