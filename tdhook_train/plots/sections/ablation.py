"""What the agent earns without one of its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.charts import HeatChart, LineChart
from tdhook_train.plots.labels import by_network, network_name
from tdhook_train.plots.panels import Array, Line, LinePanel, Mark
from tdhook_train.plots.sections.patching import largest
from tdhook_train.plots.sections.section import Picture, Section
from tdhook_train.plots.shapes import heat_panels
from tdhook_train.plots.source import Table, all_holding, columns, read
from tdhook_train.plots.style import INK, PALETTE

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["section"]

_TITLE = "What the agent earns without a part of it"
_LAYER = (
    "Mean return of the intact policy minus that of the policy without the layer, on the same episodes. What lies at "
    "0 or below is not needed for what the agent earns now; colours begin at 0. In a plain chain without skip "
    "connections a layer held constant leaves a policy that always acts alike, whichever layer it is. The hover has "
    "both returns."
)
_UNIT = (
    "The same for the single unit of each layer that the agent can least do without, among those that were ablated: a "
    "bright layer hangs on one unit."
)
_LINES = "Mean return over the episodes played for the measurement, intact and without one layer."


def section(buffer: ArtifactBuffer, marks: Sequence[Mark]) -> Section | None:
    """Show what return is lost without each layer, and without its most needed unit; None where it was not measured."""
    found = all_holding(buffer, "return_ablated")
    pictures = [
        replace(picture, title=f"{picture.title} ({name})" if len(found) > 1 else picture.title)
        for name, artifact in found.items()
        for picture in _pictures(artifact, marks)
    ]
    return Section(_TITLE, tuple(pictures)) if pictures else None


def _pictures(artifact: Artifact, marks: Sequence[Mark]) -> Iterator[Picture]:
    drop = read(artifact, "drop")
    ablated = np.nanmean(read(artifact, "return_ablated").values, -1)
    intact = ablated + drop.values
    shown = [("Return lost without a layer", _LAYER, drop.values, {"intact": intact, "without it": ablated})]
    if ("unit_drop",) in columns(artifact):
        shown.append(("Return lost without the most needed unit of a layer", _UNIT, _most(artifact), {}))
    end = max(float(np.nanmax(values, initial=0.0)) for _, _, values, _ in shown) or 1.0
    for title, text, values, hover in shown:
        panels = heat_panels(replace(drop, values=values), hover)
        yield Picture(title, text, HeatChart(panels, unit="return lost", limits=(0, end), marks=marks))
    curves = [_curves(drop, network, intact[:, at], ablated[:, at]) for network, at in _groups(drop).items()]
    yield Picture("Return, intact and ablated", _LINES, LineChart(curves, marks=marks))


def _most(artifact: Artifact) -> Array:
    units = read(artifact, "unit_drop")
    return largest(np.moveaxis(units.values, 1 + units.dims.index("unit"), -1))


def _groups(table: Table) -> dict[str, list[int]]:
    return by_network(table.labels["layer"])


def _curves(drop: Table, network: str, intact: Array, ablated: Array) -> LinePanel:
    drawn = (
        Line("intact", drop.steps, intact[:, 0], INK),
        Line("without the layer that is needed least", drop.steps, ablated.max(-1), PALETTE[0]),
        Line("without the layer that is needed most", drop.steps, ablated.min(-1), PALETTE[1]),
    )
    return LinePanel(network_name(network), "mean return", drawn, floor="data")
