"""When each target came to be known: what :mod:`tdhook_train.emergence` finds, in the words of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.emergence import emergence_table
from tdhook_train.plots.source import all_holding

if TYPE_CHECKING:
    import pandas as pd

    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["Onset", "main_onsets", "onset_table"]

_TOO_FEW = 2  # ticks


@dataclass(frozen=True)
class Onset:
    """When a target came to be known in the layer where its score rose most.

    The earliest onset of any layer would say little: some layer gains a trifle at the first ticks already.

    Args:
        target: what was learned.
        layer: where.
        step: half of the way, in optimizer steps.
    """

    target: str
    layer: str
    step: float


def onset_table(artifact: Artifact, key: str) -> pd.DataFrame | None:
    """Return the onset of every layer and target; None where there are too few ticks to speak of one."""
    return emergence_table(artifact, key) if len(artifact.steps) > _TOO_FEW else None


def main_onsets(buffer: ArtifactBuffer) -> list[Onset]:
    """Return the onset of each target in the layer where it rose most; targets without any are left out."""
    found: dict[str, tuple[float, Onset]] = {}
    for artifact in all_holding(buffer, "r2").values():
        table = onset_table(artifact, "r2")
        if table is None:
            continue
        rises = table["plateau"] - table["start"]
        for layer, target, step, rise in zip(table["layer"], table["target"], table["onset_half"], rises, strict=True):
            most = found.get(str(target))
            if np.isfinite(step) and (most is None or rise > most[0]):
                found[str(target)] = (float(rise), Onset(str(target), str(layer), float(step)))
    return [onset for _, onset in found.values()]
