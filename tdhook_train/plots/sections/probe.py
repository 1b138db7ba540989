"""What can be read from each layer, and when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.charts import HeatChart
from tdhook_train.plots.labels import by_network, network_name, short_layers
from tdhook_train.plots.onsets import onset_table
from tdhook_train.plots.panels import Array, HeatPanel, Mark, Mask
from tdhook_train.plots.sections.section import Listing, Picture, Section
from tdhook_train.plots.source import Table, all_holding, holding, read, read_like
from tdhook_train.plots.tables import MARGIN

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["LEGEND", "MARGIN", "not_above_null", "panels", "section", "targets", "unit"]

LEGEND = {
    "grey": "no evidence: the score does not beat the null",
    "dots": f"no better than the same layer before training (lead ≤ {MARGIN})",
}
_TITLE = "What each layer knows, and when"
_WHEN = (
    "The step at which half of the way from the first level to the plateau was gone, and the 95 % interval of the "
    "midpoint of a sigmoid. What never beats its null has no onset."
)
_REASONS = {"reason": "a score", "null_reason": "a null"}


@dataclass(frozen=True)
class _Kind:
    """A probe, by what it scores.

    Args:
        key: of the score that is drawn.
        unit: what the score is called.
        title: of the picture of one target.
        caption: how to read it.
        beside: keys of the numbers in the hover, by name.
    """

    key: str
    unit: str
    title: str
    caption: str
    beside: Mapping[str, str]


def _beside(key: str, **others: str) -> dict[str, str]:
    common = {"raw observation": f"{key}_observation", "initial network": f"{key}_initial", "null": f"{key}_null"}
    return {"pooled": f"{key}_pooled", **common, **others}


_HOW = (
    "on trajectories it was not fitted on; layers run upward from the input, and the row under them is the same probe "
    "on the raw observation. A bright cell is news only where it is brighter than that row and carries no dot: much "
    "can be read from an untrained network already."
)
_KINDS = (
    _Kind(
        "r2",
        "R² (clipped to 0–1)",
        "How well “{}” can be read from each layer",
        f"R² of a probe {_HOW}",
        _beside("r2", p="p"),
    ),
    _Kind(
        "balanced_accuracy",
        "balanced accuracy",
        "How well the classes of “{}” can be told apart in each layer",
        f"Balanced accuracy of a probe {_HOW} Chance is 1 ÷ classes, which the hover has.",
        _beside("balanced_accuracy", p="balanced_accuracy_p", AUC="auc", **{"log-loss": "log_loss"}, classes="classes"),
    ),
)


@dataclass(frozen=True, eq=False)
class _Scores:
    """The columns of a probe, all ``[steps, layers, targets]``."""

    kind: _Kind
    table: Table
    others: dict[str, Array]
    reasons: dict[str, Array]
    legend: Mapping[str, Mapping[int, str]]


def _first(buffer: ArtifactBuffer) -> tuple[_Kind, Artifact] | None:
    found = ((kind, holding(buffer, kind.key)) for kind in _KINDS)
    return next(((kind, artifact) for kind, artifact in found if artifact is not None), None)


def targets(buffer: ArtifactBuffer) -> list[str]:
    """Return what the run's first probe predicts; nothing without a probe."""
    found = _first(buffer)
    return [] if found is None else read(found[1], found[0].key).labels["target"]


def unit(buffer: ArtifactBuffer) -> str:
    """Return what the run's first probe scores; nothing without a probe."""
    found = _first(buffer)
    return "" if found is None else found[0].unit.partition(" (")[0]


def not_above_null(r2: Array, null: Array) -> Mask:
    """Return where a score is no evidence: it does not beat its null, or one of the two is missing.

    Where no null was computed at all, only missing scores count: a picture all in grey would hide what there is.
    """
    if np.isnan(null).all():
        return np.isnan(r2)
    return ~(r2 > null)


def panels(buffer: ArtifactBuffer, target: str) -> list[HeatPanel]:
    """Return a panel per network with the first probe's scores of one target; nothing without a probe."""
    found = _first(buffer)
    return [] if found is None else _panels(_read(*found), target)


def _panels(scores: _Scores, target: str) -> list[HeatPanel]:
    place = scores.table.labels["target"].index(target)
    groups = by_network(scores.table.labels["layer"])
    return [_panel(scores, network_name(network), chosen, place) for network, chosen in groups.items()]


def _read(kind: _Kind, artifact: Artifact) -> _Scores:
    table = read(artifact, kind.key)
    others = {name: read_like(artifact, key, table) for name, key in kind.beside.items()}
    return _Scores(kind, table, others, {key: read_like(artifact, key, table) for key in _REASONS}, artifact.legend)


def _panel(scores: _Scores, title: str, chosen: list[int], place: int) -> HeatPanel:
    table = scores.table
    values = table.values[:, chosen, place].T
    others = {name: numbers[:, chosen, place].T for name, numbers in scores.others.items()}
    names = [table.labels["layer"][position] for position in chosen]
    observation = others["raw observation"]
    return HeatPanel(
        title=title,
        steps=table.steps,
        rows=short_layers(names, table.layer_types(chosen)),
        values=values,
        names=names,
        grey=not_above_null(values, others["null"]),
        dots=values <= others["initial network"] + MARGIN,
        below=("raw observation", observation[0]) if np.isfinite(observation).any() else None,
        hover={name: numbers for name, numbers in others.items() if np.isfinite(numbers).any()},
    )


def section(buffer: ArtifactBuffer, marks: Sequence[Mark]) -> Section:
    """Show a what-when-where picture for each target (McGrath et al. 2022, arXiv:2111.09259)."""
    pictures = tuple(picture for kind in _KINDS for picture in _of_kind(buffer, kind, marks))
    pictures += tuple(picture for kind in _KINDS for picture in _when(buffer, kind))
    if not pictures:
        missing = "No probe was recorded: no artifact of this run has scores over layers ('r2', 'balanced_accuracy')."
        return Section(_TITLE, missing=missing)
    return Section(_TITLE, pictures)


def _of_kind(buffer: ArtifactBuffer, kind: _Kind, marks: Sequence[Mark]) -> Iterator[Picture]:
    found = all_holding(buffer, kind.key)
    for name, artifact in found.items():
        scores = _read(kind, artifact)
        for target in scores.table.labels["target"]:
            title = kind.title.format(target) + (f" ({name})" if len(found) > 1 else "")
            yield _picture(scores, target, title, marks)


def _when(buffer: ArtifactBuffer, kind: _Kind) -> Iterator[Picture]:
    for name, artifact in all_holding(buffer, kind.key).items():
        table = onset_table(artifact, kind.key)
        if table is None:
            continue
        wanted = ("layer", "target", "onset_half", "low", "high", "reason")
        rows = [tuple(_cell(value) for value in row) for row in zip(*(table[name] for name in wanted), strict=True)]
        header = ("layer", "target", "half of the way at step", "sigmoid from", "to", "why not")
        listing = Listing(header, rows, f"{len(rows)} onsets of {kind.key} ({name})")
        yield Picture(f"When each layer came to know what: {name}", _WHEN, listings=(listing,))


def _cell(value: object) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:,.0f}" if np.isfinite(value) else "–"
    return str(value)


def _picture(scores: _Scores, target: str, title: str, marks: Sequence[Mark]) -> Picture:
    shown = _panels(scores, target)
    chart = HeatChart(shown, unit=scores.kind.unit, legend=LEGEND, marks=marks)
    place = scores.table.labels["target"].index(target)
    return Picture(title, scores.kind.caption, chart, _no_null(scores, place) + _reasons(scores, place))


def _no_null(scores: _Scores, place: int) -> str:
    if np.isfinite(scores.others["null"][..., place]).any():
        return ""
    return "No null was computed for this target, so nothing is greyed for it: high values may be chance."


def _reasons(scores: _Scores, place: int) -> str:
    """Say why cells have no score, or no null, by the codes that the probe left."""
    told = ""
    for key, what in _REASONS.items():
        codes, counts = np.unique(np.nan_to_num(scores.reasons[key][..., place]).astype(int), return_counts=True)
        names = scores.legend.get(key, {})
        causes = [f"{names.get(code, code)} ({n:,})" for code, n in zip(codes, counts, strict=True) if code]
        told += f" Cells without {what}: {'; '.join(causes)}." if causes else ""
    return told
