"""One key of an artifact, a row a step, to compare the steps of a run with one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError, did_you_mean

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact

__all__ = ["Key", "Rows", "held_keys", "rows_of"]

Key = str | tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """One key, a row a step."""

    steps: list[int]
    data: Tensor  # fingerprint of what was measured on
    values: Tensor
    dims: tuple[str, ...]  # without the network's name

    @property
    def same(self) -> Tensor:
        """Which steps were measured on the same data: ``[step, step]``."""
        return self.data[:, None] == self.data

    @property
    def kept(self) -> Tensor:
        """Which neighbours were: ``[step - 1]``."""
        return self.data[1:] == self.data[:-1]

    def neighbours(self, needed: int = 2) -> None:
        """Refuse fewer rows than can be compared."""
        if len(self.steps) < needed:
            raise SettingsError(f"a comparison over steps needs {needed} steps, got {len(self.steps)}")


def rows_of(artifact: Artifact, key: Key) -> Rows:
    """Read one key; of several rows of one step the last counts.

    Raises:
        SettingsError: the artifact holds the rows of several runs.
        KeyMissingError: it lacks the key.
    """
    if artifact.runs:
        raise SettingsError("a comparison over steps is of one run; open the runs that were merged one by one")
    dims = tuple(dim.rsplit(".", 1)[-1] for dim in artifact.dims(key))  # refuses a key that is not there
    rows = artifact.between(keys=[key, ("meta", "step"), ("meta", "data")])
    steps = rows["meta", "step"]
    last = torch.cat([steps[1:] != steps[:-1], torch.ones(1, dtype=torch.bool)])[-len(steps) :]
    rows = rows[last] if len(steps) else rows
    return Rows(rows["meta", "step"].tolist(), rows["meta", "data"], rows[_known(artifact, key)], dims)


def _known(artifact: Artifact, key: Key) -> tuple[str, ...]:
    """Return a key in full, where it was given with dots."""
    whole = (key,) if isinstance(key, str) else tuple(key)
    return next((one for one in artifact.schema.columns if one == whole or ".".join(one) == key), whole)


def held_keys(artifact: Artifact) -> str:
    """Say what an artifact holds, for errors."""
    keys = (".".join(key) for key in artifact.schema.columns if key[0] != "meta")
    return did_you_mean("", keys).removeprefix("; ")
