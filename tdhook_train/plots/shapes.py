"""From a column of numbers to the panels that show it, by its dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from tdhook_train.plots.labels import by_network, network_name, short_layers
from tdhook_train.plots.panels import Array, HeatPanel, Line, LinePanel
from tdhook_train.plots.source import Table
from tdhook_train.plots.style import PALETTE

__all__ = ["heat_panels", "line_panel"]

_NONE: Mapping[str, Array] = MappingProxyType({})


def heat_panels(table: Table, hover: Mapping[str, Array] = _NONE, *, title: str = "") -> list[HeatPanel]:
    """Return a panel a network for numbers ``[steps, rows]``; of rows that are no layers, one panel.

    Args:
        table: a column with one dimension.
        hover: further numbers of each cell, in the same shape.
        title: what stands before the network's name, for instance the target.
    """
    (dim,) = table.dims
    labels = table.labels[dim]
    if dim != "layer":
        return [HeatPanel(title or dim, table.steps, labels, table.values.T, labels, hover=_rows(hover, slice(None)))]
    shown = []
    for network, chosen in by_network(labels).items():
        names = [labels[position] for position in chosen]
        rows = short_layers(names, table.layer_types(chosen))
        whole = " · ".join(part for part in (title, network_name(network)) if part)
        values = table.values[:, chosen].T
        shown.append(HeatPanel(whole, table.steps, rows, values, names, hover=_rows(hover, chosen)))
    return shown


def _rows(hover: Mapping[str, Array], chosen: list[int] | slice) -> dict[str, Array]:
    return {name: values[:, chosen].T for name, values in hover.items()}


def line_panel(table: Table, *, title: str = "", unit: str) -> LinePanel:
    """Return a panel with a line for each label of the one dimension of ``[steps, lines]``, or for none, one line.

    The first lines have colours of their own; where there are more than colours, those that vary most.
    """
    if not table.dims:
        return LinePanel(title, unit, (Line(unit, table.steps, table.values, PALETTE[0]),), floor="data")
    (dim,) = table.dims
    spread = [_spread(column) for column in table.values.T]
    most = sorted(range(len(spread)), key=lambda place: -spread[place])[: len(PALETTE)]
    colors = dict(zip(sorted(most), PALETTE, strict=False))
    drawn = [
        Line(
            name=label,
            x=table.steps,
            y=table.values[:, place],
            color=colors.get(place, ""),
            weight="normal" if place in colors else "faint",
        )
        for place, label in enumerate(table.labels[dim])
    ]
    drawn.sort(key=lambda line: line.weight == "normal")  # grey lines lie underneath
    return LinePanel(title, unit, tuple(drawn), floor="data")


def _spread(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(np.ptp(known)) if known.size else 0.0
