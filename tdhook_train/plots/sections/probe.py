"""What can be read from each layer, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.heat_map import heat_map
from tdhook_train.plots.labels import by_network, network_name, short_layers
from tdhook_train.plots.panels import Array, HeatPanel, Mark, Mask
from tdhook_train.plots.sections.section import Picture, Section
from tdhook_train.plots.source import Table, holding, read, read_like
from tdhook_train.plots.tables import MARGIN

if TYPE_CHECKING:
    from tdhook_train.buffer import ArtifactBuffer

__all__ = ["LEGEND", "MARGIN", "not_above_null", "panels", "section", "targets"]

LEGEND = {
    "grey": "no evidence: R² does not beat the null",
    "dots": f"no better than the same layer before training (lead ≤ {MARGIN})",
}
_TITLE = "What each layer knows, and when"
_REASONS = {"reason": "a score", "null_reason": "a null"}
_SCORES = {
    "pooled": "r2_pooled",
    "raw observation": "r2_observation",
    "initial network": "r2_initial",
    "null": "r2_null",
    "p": "p",
}


@dataclass(frozen=True, eq=False)
class _Scores:
    """The columns of a probe, all ``[steps, layers, targets]``."""

    r2: Table
    others: dict[str, Array]
    reasons: dict[str, Array]
    legend: Mapping[str, Mapping[int, str]]


def targets(buffer: ArtifactBuffer) -> list[str]:
    """Return what the run's probe predicts; nothing without a probe."""
    probe = holding(buffer, "r2")
    return read(probe, "r2").labels["target"] if probe is not None else []


def not_above_null(r2: Array, null: Array) -> Mask:
    """Return where a score is no evidence: it does not beat its null, or one of the two is missing.

    Where no null was computed at all, only missing scores count: a picture all in grey would hide what there is.
    """
    if np.isnan(null).all():
        return np.isnan(r2)
    return ~(r2 > null)


def panels(buffer: ArtifactBuffer, target: str) -> list[HeatPanel]:
    """Return a panel per network with the probe scores of one target; nothing without a probe."""
    scores = _read(buffer)
    return [] if scores is None else _panels(scores, target)


def _panels(scores: _Scores, target: str) -> list[HeatPanel]:
    place = scores.r2.labels["target"].index(target)
    groups = by_network(scores.r2.labels["layer"])
    return [_panel(scores, network_name(network), chosen, place) for network, chosen in groups.items()]


def _read(buffer: ArtifactBuffer) -> _Scores | None:
    probe = holding(buffer, "r2")
    if probe is None:
        return None
    r2 = read(probe, "r2")
    others = {name: read_like(probe, key, r2) for name, key in _SCORES.items()}
    return _Scores(r2, others, {key: read_like(probe, key, r2) for key in _REASONS}, probe.legend)


def _panel(scores: _Scores, title: str, chosen: list[int], place: int) -> HeatPanel:
    table = scores.r2
    r2 = table.values[:, chosen, place].T
    others = {name: values[:, chosen, place].T for name, values in scores.others.items()}
    names = [table.labels["layer"][position] for position in chosen]
    observation = others["raw observation"]
    return HeatPanel(
        title=title,
        steps=table.steps,
        rows=short_layers(names, table.layer_types(chosen)),
        values=r2,
        names=names,
        grey=not_above_null(r2, others["null"]),
        dots=r2 <= others["initial network"] + MARGIN,
        below=("raw observation", observation[0]) if np.isfinite(observation).any() else None,
        hover=others,
    )


def section(buffer: ArtifactBuffer, marks: Sequence[Mark]) -> Section:
    """Show a what-when-where picture for each target (McGrath et al. 2022, arXiv:2111.09259)."""
    scores = _read(buffer)
    if scores is None:
        return Section(_TITLE, missing="No probe was recorded: no artifact of this run has R² over layers (key 'r2').")
    return Section(_TITLE, tuple(_picture(scores, target, marks) for target in scores.r2.labels["target"]))


def _picture(scores: _Scores, target: str, marks: Sequence[Mark]) -> Picture:
    shown = _panels(scores, target)
    figure = heat_map(shown, unit="R² (clipped to 0–1)", legend=LEGEND, marks=marks)
    caption = _caption(shown) + _reasons(scores, scores.r2.labels["target"].index(target))
    return Picture(f"How well “{target}” can be read from each layer", caption, figure)


def _reasons(scores: _Scores, place: int) -> str:
    """Say why cells have no score, or no null, by the codes that the probe left."""
    told = ""
    for key, what in _REASONS.items():
        codes, counts = np.unique(np.nan_to_num(scores.reasons[key][..., place]).astype(int), return_counts=True)
        names = scores.legend.get(key, {})
        causes = [f"{names.get(code, code)} ({n:,})" for code, n in zip(codes, counts, strict=True) if code]
        told += f" Cells without {what}: {'; '.join(causes)}." if causes else ""
    return told


def _caption(shown: Sequence[HeatPanel]) -> str:
    text = (
        "R² of a ridge probe on trajectories it was not fitted on; layers run upward from the input, and the row "
        "under them is the same probe on the raw observation. A bright cell is news only where it is brighter than "
        "that row and carries no dot: much can be read from an untrained network already."
    )
    if all(np.isnan(panel.hover["null"]).all() for panel in shown):
        text += " No null was computed for this target, so nothing is greyed for it: high values may be chance."
    return text
