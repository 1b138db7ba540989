"""How much of each network is in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.charts import HeatChart
from tdhook_train.plots.heat_map import ceiling
from tdhook_train.plots.labels import by_network, network_name
from tdhook_train.plots.panels import Array, Line, LinePanel, Mark, Style
from tdhook_train.plots.sections.section import Picture, Section
from tdhook_train.plots.shapes import heat_panels
from tdhook_train.plots.source import Table, holding, read
from tdhook_train.plots.style import PALETTE

if TYPE_CHECKING:
    from tdhook_train.buffer import ArtifactBuffer

__all__ = ["Measure", "measures", "overview", "section"]

_TITLE = "How much of the networks is in use"
_RANKS = {"effective_rank_centred": "effective rank, centred", "effective_rank": "effective rank"}
_DORMANT = (
    "Share of a layer's units whose mean |activation| is at most {tau} of the layer's average (Sokar et al. 2023). "
    "The rule was made for ReLU: a tanh unit stuck at ±1 is not dormant by it, but dead by the next one."
)
_DEAD = (
    "Share of a layer's units that no longer respond to the input: zero on every state for ReLU, constant (standard "
    "deviation below 0.001) for tanh."
)
_RANK = (
    "Effective rank of the layer's activations (Roy and Vetterli 2007), centred where the run has it, as a share of "
    "its width; the hover has the rank. A narrow layer has a high share by construction: compare a layer with itself "
    "over time, not with its neighbours."
)
_STYLES: tuple[tuple[Style, str], ...] = (("solid", "solid"), ("dash", "dashed"), ("dot", "dotted"))


@dataclass(frozen=True, eq=False)
class Measure:
    """A share of each layer, ``[steps, layers]``, and what to say about it.

    Shares of units have no ``hover`` and all the same colours, so that thresholds can be compared.
    """

    title: str
    short: str
    caption: str
    share: Table
    hover: dict[str, Array]


def measures(buffer: ArtifactBuffer) -> list[Measure]:
    """Return the health measures that the run recorded, each as a share of a layer's units or width."""
    return [*_dormant(buffer), *_dead(buffer), *_rank(buffer)]


def _dormant(buffer: ArtifactBuffer) -> list[Measure]:
    artifact = holding(buffer, "dormant")
    if artifact is None:
        return []
    table = read(artifact, "dormant")
    taus = table.labels.get("tau", [""]) if "tau" in table.dims else [""]
    return [_dormant_at(table, tau) for tau in taus]


def _dormant_at(table: Table, tau: str) -> Measure:
    named = f"τ = {float(tau):g}" if tau else "no threshold recorded"
    return Measure(
        f"Dormant units ({named})", f"dormant, {named}", _DORMANT.format(tau=tau), table.pick("tau", tau), {}
    )


def _dead(buffer: ArtifactBuffer) -> list[Measure]:
    artifact = holding(buffer, "dead")
    return [] if artifact is None else [Measure("Dead units", "dead", _DEAD, read(artifact, "dead"), {})]


def _rank(buffer: ArtifactBuffer) -> list[Measure]:
    """Return the rank of centred activations, which one large mean cannot hide; of raw ones where there is no other."""
    sized = holding(buffer, "width")
    known = {key: held for key in _RANKS if (held := holding(buffer, key)) is not None}
    if sized is None or not known:
        return []
    ranks = {_RANKS[key]: read(held, key) for key, held in known.items()}
    rank = next(iter(ranks.values()))
    width = read(sized, "width").like(rank)
    share = np.divide(rank.values, width, out=np.full_like(rank.values, np.nan), where=width > 0)
    hover = {**{name: table.values for name, table in ranks.items()}, "width": width}
    return [Measure("Dimensions in use", "effective rank ÷ width", _RANK, replace(rank, values=share), hover)]


def overview(buffer: ArtifactBuffer) -> LinePanel | None:
    """Return one panel with every measure, averaged over the layers of each network: solid, then dashed."""
    found = measures(buffer)
    if not found:
        return None
    drawn = [
        _line(measure, network, chosen, (color, style))
        for measure, color in zip(found, PALETTE, strict=False)
        for (network, chosen), (style, _) in zip(_groups(measure.share).items(), _STYLES, strict=False)
    ]
    names = [network_name(network).removesuffix(" network") for network in _groups(found[0].share)]
    looks = ", ".join(f"{name} {look}" for name, (_, look) in zip(names, _STYLES, strict=False))
    title = f"mean over layers ({looks})" if len(names) > 1 else "mean over layers"
    return LinePanel(title, "share of units", tuple(drawn), limits=(0.0, 1.0))


def _line(measure: Measure, network: str, chosen: list[int], look: tuple[str, Style]) -> Line:
    name = f"{measure.short}: {network_name(network)}"
    return Line(name, measure.share.steps, _mean(measure.share, chosen), look[0], look[1])


def _groups(table: Table) -> dict[str, list[int]]:
    return by_network(table.labels["layer"])


def _mean(table: Table, chosen: list[int]) -> Array:
    values = table.values[:, chosen]
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(-1)
    return np.where(known.any(-1), total / np.maximum(known.sum(-1), 1), np.nan)


def section(buffer: ArtifactBuffer, marks: Sequence[Mark]) -> Section:
    """Show dormant units, dead units and the effective rank of each layer over training."""
    found = measures(buffer)
    if not found:
        return Section(
            _TITLE, missing="No health measure was recorded over layers (keys 'dormant', 'dead', 'effective_rank')."
        )
    units = ceiling([panel for measure in found if not measure.hover for panel in heat_panels(measure.share)])
    return Section(_TITLE, tuple(_picture(measure, 1.0 if measure.hover else units, marks) for measure in found))


def _picture(measure: Measure, end: float, marks: Sequence[Mark]) -> Picture:
    table = measure.share
    if np.nanmax(table.values, initial=0.0) == 0.0:
        seen = "None, in any layer at any tick." if np.isfinite(table.values).any() else "Not measured."
        return Picture(measure.title, measure.caption, note=seen)
    panels = heat_panels(table, measure.hover)
    return Picture(measure.title, measure.caption, HeatChart(panels, measure.short, (0, end), marks=marks))
