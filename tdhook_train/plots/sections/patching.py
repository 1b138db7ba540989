"""Which parts carry the decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.charts import HeatChart, LineChart
from tdhook_train.plots.heat_map import ceiling
from tdhook_train.plots.labels import by_network, network_name, short_layers
from tdhook_train.plots.panels import Array, HeatPanel, Line, LinePanel, Mark
from tdhook_train.plots.sections.section import Picture, Section
from tdhook_train.plots.source import Table, holding, read, read_like
from tdhook_train.plots.style import INK, PALETTE

if TYPE_CHECKING:
    from tdhook_train.buffer import ArtifactBuffer

__all__ = ["largest", "section"]

_TITLE = "Which parts carry the decision"


@dataclass(frozen=True, eq=False)
class _Effects:
    """Patch effects on one output of one network, each ``[steps, layers]``, in units of the output."""

    network: str
    target: str
    names: list[str]
    rows: list[str]
    table: Table
    whole: Array
    unit: Array
    gap: Array

    @property
    def title(self) -> str:
        """Network and output, as panels name them."""
        return f"{self.target} · {network_name(self.network)}" if self.network else self.target


def largest(values: Array) -> Array:
    """Return the largest over the last axis, NaN where all are: a layer with fewer units has NaN for the rest."""
    highest = np.where(np.isnan(values), -np.inf, values).max(-1, initial=-np.inf)
    return np.where(np.isinf(highest), np.nan, highest)


def section(buffer: ArtifactBuffer, marks: Sequence[Mark]) -> Section:
    """Show how much of a layer's patch effect one unit carries, and how large the effects are."""
    found = _effects(buffer)
    if not found:
        missing = "No patching was recorded: no artifact of this run has effects of layers and units ('unit_effect')."
        return Section(_TITLE, missing=missing)
    return Section(_TITLE, (_share(found, marks), _size(found, marks)))


def _effects(buffer: ArtifactBuffer) -> list[_Effects]:
    artifact = holding(buffer, "unit_effect")
    if artifact is None or holding(buffer, "effect") is None:
        return []
    whole, units = read(artifact, "effect"), read(artifact, "unit_effect")
    gap = read_like(artifact, "gap", whole)
    by_unit = largest(np.moveaxis(units.values, 1 + units.dims.index("unit"), -1))
    found = [
        _effect(whole, (by_unit, gap), network, (chosen, place))
        for network, chosen in by_network(whole.labels["layer"]).items()
        for place in range(len(whole.labels["target"]))
    ]
    return [effects for effects in found if np.isfinite(effects.unit).any()]  # an output of this network


def _effect(whole: Table, others: tuple[Array, Array], network: str, at: tuple[list[int], int]) -> _Effects:
    chosen, place = at
    unit, gap = (values[:, chosen, place] for values in others)
    names = [whole.labels["layer"][position] for position in chosen]
    rows = short_layers(names, whole.layer_types(chosen))
    target = whole.labels["target"][place]
    return _Effects(network, target, names, rows, whole, whole.values[:, chosen, place], unit, gap)


def _share(found: Sequence[_Effects], marks: Sequence[Mark]) -> Picture:
    shown = []
    for effects in found:
        share = np.divide(effects.unit, effects.whole, out=np.full_like(effects.unit, np.nan), where=effects.whole > 0)
        hover = {"largest unit": effects.unit.T, "whole layer": effects.whole.T, "gap": effects.gap.T}
        panel = HeatPanel(effects.title, effects.table.steps, effects.rows, share.T, effects.names)
        shown.append(replace(panel, hover=hover))
    caption = (
        "Mean change of the output when the most influential unit of a layer takes its value from another state, as "
        "a share of what the whole layer does: a bright layer hangs on one unit, in a dark one many share the work. "
        "Where a unit is the output itself the share is 1 by construction; shares do not add up over units. In a plain "
        "chain the effect of a whole layer is the same at every layer, so this share is what tells layers apart. "
        "Grey: no effect to have a share of."
    )
    chart = HeatChart(shown, unit="largest unit ÷ layer", limits=(0, ceiling(shown)), marks=marks)
    return Picture("How much of a layer's effect a single unit carries", caption, chart)


def _size(found: Sequence[_Effects], marks: Sequence[Mark]) -> Picture:
    shown = []
    for effects in found:
        steps = effects.table.steps
        drawn = (
            Line("a whole layer", steps, _median(effects.whole), PALETTE[0]),
            Line("the most influential unit of a layer", steps, _median(effects.unit), PALETTE[1]),
            Line("the difference between the states", steps, _median(effects.gap), INK, style="dash"),
        )
        shown.append(LinePanel(effects.title, f"mean |change| (units of {effects.target})", drawn))
    caption = (
        "Change of the output when activations are replaced by those of a paired state (median over layers), "
        "beside the difference between the two states' outputs. In a plain chain of layers a whole layer carries "
        "everything, so its effect equals the dashed line by construction: only single units tell layers apart."
    )
    return Picture("How far patching moves the outputs", caption, LineChart(shown, marks=marks))


def _median(values: Array) -> Array:
    """Return the median over layers, NaN where no layer has a number."""
    return np.array([np.median(row[~np.isnan(row)]) if (~np.isnan(row)).any() else np.nan for row in values])
