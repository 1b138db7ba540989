"""What the agent earns without one of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.heat_map import heat_map
from tdhook_train.plots.labels import by_network, network_name, short_layers
from tdhook_train.plots.lines import lines
from tdhook_train.plots.panels import Array, HeatPanel, Line, LinePanel, Mark
from tdhook_train.plots.sections.patching import largest
from tdhook_train.plots.sections.section import Picture, Section
from tdhook_train.plots.source import Table, columns, holding, read
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
    artifact = holding(buffer, "return_ablated")
    if artifact is None:
        return None
    drop = read(artifact, "drop")
    ablated = np.nanmean(read(artifact, "return_ablated").values, -1)
    intact = ablated + drop.values
    shown = [("Return lost without a layer", _LAYER, drop.values, {"intact": intact, "without it": ablated})]
    if ("unit_drop",) in columns(artifact):
        shown.append(("Return lost without the most needed unit of a layer", _UNIT, _most(artifact), {}))
    end = max(float(np.nanmax(values, initial=0.0)) for _, _, values, _ in shown) or 1.0
    pictures = [
        Picture(title, text, heat_map(_panels(drop, values, hover), unit="return lost", limits=(0, end), marks=marks))
        for title, text, values, hover in shown
    ]
    curves = [_curves(drop, network, intact[:, at], ablated[:, at]) for network, at in _groups(drop).items()]
    return Section(_TITLE, (*pictures, Picture("Return, intact and ablated", _LINES, lines(curves, marks=marks))))


def _most(artifact: Artifact) -> Array:
    units = read(artifact, "unit_drop")
    return largest(np.moveaxis(units.values, 1 + units.dims.index("unit"), -1))


def _groups(table: Table) -> dict[str, list[int]]:
    return by_network(table.labels["layer"])


def _panels(drop: Table, values: Array, hover: dict[str, Array]) -> list[HeatPanel]:
    shown = []
    for network, chosen in _groups(drop).items():
        names = [drop.labels["layer"][position] for position in chosen]
        rows = short_layers(names, drop.layer_types(chosen))
        own = {name: numbers[:, chosen].T for name, numbers in hover.items()}
        shown.append(HeatPanel(network_name(network), drop.steps, rows, values[:, chosen].T, names, hover=own))
    return shown


def _curves(drop: Table, network: str, intact: Array, ablated: Array) -> LinePanel:
    drawn = (
        Line("intact", drop.steps, intact[:, 0], INK),
        Line("without the layer that is needed least", drop.steps, ablated.max(-1), PALETTE[0]),
        Line("without the layer that is needed most", drop.steps, ablated.min(-1), PALETTE[1]),
    )
    return LinePanel(network_name(network), "mean return", drawn, floor="data")
