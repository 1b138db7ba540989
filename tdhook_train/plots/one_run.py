"""One of several runs that were merged into one buffer, to be read as if it lay alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tensordict import TensorDictBase

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact, ArtifactBuffer
    from tdhook_train.buffer.schema import Schema

__all__ = ["artifacts_by_run", "by_run"]


def by_run(buffer: ArtifactBuffer, label: str) -> dict[str, ArtifactBuffer]:
    """Return each of the runs in a buffer by its label; itself, under ``label``, where nothing was merged."""
    if not buffer.runs:
        return {label: buffer}
    return {name: cast("ArtifactBuffer", _Run(buffer, number)) for number, name in enumerate(buffer.runs)}


def artifacts_by_run(artifact: Artifact, label: str) -> dict[str, Artifact]:
    """Return an artifact of each of the runs in its buffer; itself, under ``label``, where nothing was merged."""
    if not artifact.runs:
        return {label: artifact}
    return {name: cast("Artifact", _Rows(artifact, number)) for number, name in enumerate(artifact.runs)}


class _Run:
    """The part of a merged buffer that the report reads."""

    def __init__(self, whole: ArtifactBuffer, number: int) -> None:
        self._whole, self._number = whole, number
        self.label = whole.runs[number]

    @property
    def path(self) -> Path:
        return self._whole.path

    @property
    def origin(self) -> Mapping[str, Any]:
        return self._whole.origin

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __getitem__(self, name: str) -> _Rows:
        return _Rows(self._whole[name], self._number)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        return [event for event in self._whole.events(kind) if event.get("run") == self.label]


class _Rows:
    """The rows of one run in a merged artifact."""

    runs: tuple[str, ...] = ()

    def __init__(self, whole: Artifact, number: int) -> None:
        self._whole, self._number = whole, number
        self._own = torch.nonzero(whole.series(("meta", "run")) == number).flatten()

    def __len__(self) -> int:
        return len(self._own)

    @property
    def schema(self) -> Schema:
        return self._whole.schema

    @property
    def steps(self) -> torch.Tensor:
        return self._whole.steps[self._own]

    def series(self, key: str | tuple[str, ...]) -> torch.Tensor:
        return self._whole.series(key)[self._own]

    def at(self, step: int) -> TensorDictBase:
        rows = self._whole.between(step, step)
        return rows[rows["meta", "run"] == self._number][-1]

    def dims(self, key: str | tuple[str, ...]) -> tuple[str, ...]:
        return self._whole.dims(key)

    @property
    def coords(self) -> dict[str, list[Any]]:
        return self._whole.coords

    @property
    def legend(self) -> dict[Any, dict[int, str]]:
        return self._whole.legend

    @property
    def settings(self) -> Any:
        return self._whole.settings
