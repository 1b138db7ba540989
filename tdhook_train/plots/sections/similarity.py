"""How far each layer has moved, and which layers are alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.charts import HeatChart
from tdhook_train.plots.labels import by_network, network_name, short_layers
from tdhook_train.plots.panels import HeatPanel, Mark
from tdhook_train.plots.sections.section import Picture, Section
from tdhook_train.plots.shapes import heat_panels
from tdhook_train.plots.source import Table, all_holding, read

if TYPE_CHECKING:
    from tdhook_train.buffer import ArtifactBuffer

__all__ = ["section"]

_TITLE = "How far the layers have moved"
_HOW = (
    "Debiased linear CKA of what a layer gives out on the same rows: 1 is alike up to rotation, shift and scale, what "
    "has nothing in common is about 0 and may lie below. Grey: not to be compared, as where a layer gives out the "
    "same on every row."
)
_TO = {
    "cka_initial": "Each layer beside itself at initialisation",
    "cka_previous": "Each layer beside itself at the tick before",
    "cka_reference": "Each layer beside the reference network's",
}
_TICKS = 4


def section(buffer: ArtifactBuffer, marks: Sequence[Mark]) -> Section | None:
    """Show how alike layers are to themselves elsewhere, and to each other; None where it was not measured."""
    pictures = (*_over_training(buffer, marks), *_among(buffer))
    return Section(_TITLE, pictures) if pictures else None


def _named(title: str, name: str, count: int) -> str:
    return f"{title} ({name})" if count > 1 else title


def _over_training(buffer: ArtifactBuffer, marks: Sequence[Mark]) -> Iterator[Picture]:
    for key, title in _TO.items():
        found = all_holding(buffer, key)
        for name, artifact in found.items():
            chart = HeatChart(heat_panels(read(artifact, key)), unit="CKA (clipped to 0–1)", marks=marks)
            yield Picture(_named(title, name, len(found)), _HOW, chart)


def _among(buffer: ArtifactBuffer) -> Iterator[Picture]:
    found = all_holding(buffer, "cka_layers")
    for name, artifact in found.items():
        table = read(artifact, "cka_layers")
        for network, chosen in by_network(table.labels["layer"]).items():
            title = f"Layers of the {network_name(network)} beside each other"
            caption = f"{_HOW} At the first tick, the last and some between."
            chart = HeatChart(list(_maps(table, network, chosen)), unit="CKA (clipped to 0–1)")
            yield Picture(_named(title, name, len(found)), caption, chart)


def _maps(table: Table, network: str, chosen: list[int]) -> Iterator[HeatPanel]:
    names = [table.labels["layer"][position] for position in chosen]
    rows = short_layers(names, table.layer_types(chosen))
    own = [name.removeprefix(f"{network}.") for name in names]  # the other side goes by paths within a network
    beside = [table.labels["other"].index(name) for name in own]
    ticks = np.unique(np.linspace(0, len(table.steps) - 1, _TICKS).round().astype(int))
    for tick in ticks:
        values = table.values[tick][np.ix_(chosen, beside)]
        count = np.arange(len(rows))
        yield HeatPanel(f"step {table.steps[tick]:,}", count, rows, values, names, columns=rows)
