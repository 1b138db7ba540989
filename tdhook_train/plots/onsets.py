"""When each target came to be known: what :mod:`tdhook_train.emergence` finds, in the words of the report."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.source import all_holding

if TYPE_CHECKING:
    import pandas as pd

    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["Onset", "first_onsets", "onset_table"]


@dataclass(frozen=True)
class Onset:
    """The first layer from which a target could be read.

    Args:
        target: what was learned.
        layer: where first.
        step: half of the way, in optimizer steps.
    """

    target: str
    layer: str
    step: float


def onset_table(artifact: Artifact, key: str) -> pd.DataFrame | None:
    """Return the onset of every layer and target; None where this installation cannot find any.

    The columns that are read: ``layer``, ``target``, ``onset_half``, ``low``, ``high``, ``reason``.
    """
    if find_spec("tdhook_train.emergence") is None:
        return None
    table: pd.DataFrame = import_module("tdhook_train.emergence").emergence_table(artifact, key)
    return table


def first_onsets(buffer: ArtifactBuffer) -> list[Onset]:
    """Return the earliest onset of each target over all layers; targets without any are left out."""
    found: dict[str, Onset] = {}
    for artifact in all_holding(buffer, "r2").values():
        table = onset_table(artifact, "r2")
        if table is None:
            continue
        for layer, target, step in zip(table["layer"], table["target"], table["onset_half"], strict=True):
            earliest = found.get(str(target))
            if np.isfinite(step) and (earliest is None or step < earliest.step):
                found[str(target)] = Onset(str(target), str(layer), float(step))
    return list(found.values())
