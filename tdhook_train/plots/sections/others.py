"""What no section of its own shows, by the shape of its data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tdhook_train.plots.charts import Chart, HeatChart, LineChart
from tdhook_train.plots.panels import Mark
from tdhook_train.plots.sections.section import Picture, Section
from tdhook_train.plots.shapes import heat_panels, line_panel
from tdhook_train.plots.source import Key, Table, columns, read, recorded

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["section"]

_TITLE = "What else was measured"
_MOST = 6  # pictures of an artifact, panels of a picture: a page that shows everything shows nothing
_SHOWN = {
    *("r2", "balanced_accuracy", "attr", "unit_effect", "return_intact", "shares"),
    *("cka_initial", "cka_previous", "cka_reference", "cka_layers"),
}
_HEALTH = {"dormant", "dead", "effective_rank", "effective_rank_centred", "width"}


def section(buffer: ArtifactBuffer, marks: Sequence[Mark]) -> Section | None:
    """Show what has layers as a map and what has none as lines; None where every artifact has a section of its own."""
    pictures = tuple(picture for name, artifact in recorded(buffer) for picture in _pictures(name, artifact, marks))
    return Section(_TITLE, pictures) if pictures else None


def _pictures(name: str, artifact: Artifact, marks: Sequence[Mark]) -> Iterator[Picture]:
    if any(part in _SHOWN for key in columns(artifact) for part in key):
        return
    tables = {key: table for key in columns(artifact) if (table := _shown(artifact, key)) is not None}
    for key, table in list(tables.items())[:_MOST]:
        what = " · ".join(key)
        if "layer" in table.dims:
            panels = [panel for title, one in _by_target(table) for panel in heat_panels(one, title=title)]
            known = table.values[np.isfinite(table.values)]
            limits = float(known.min()), float(known.max())
            chart: Chart = HeatChart(panels, unit=what, limits=limits, marks=marks)
        else:
            chart = LineChart([line_panel(table, title=what, unit=what)], marks=marks)
        yield Picture(f"{what} ({name})", "As the method's documentation says under this name. Grey: no number.", chart)
    if left := list(tables)[_MOST:]:
        rest = ", ".join(repr(key[0] if len(key) == 1 else key) for key in left)
        yield Picture(f"More of {name}", f"Shown by plots.heat(buffer[{name!r}], key), plots.lines likewise: {rest}.")


def _shown(artifact: Artifact, key: Key) -> Table | None:
    """Return a column that a picture can show whole: numbers, of layers and targets at most, or of one dimension."""
    dims = {dim.rsplit(".", 1)[-1] for dim in artifact.dims(key)}
    few = dims <= {"layer", "target"} if "layer" in dims else len(dims) < 2 and not dims & {"batch", "unit", "rank"}
    if not few or key[-1] in _HEALTH or not artifact.series(key).is_floating_point():
        return None
    table = read(artifact, key)
    return table if np.isfinite(table.values).any() else None


def _by_target(table: Table) -> Iterator[tuple[str, Table]]:
    if "target" not in table.dims:
        yield "", table
        return
    for target in table.labels["target"][:_MOST]:
        yield target, table.pick("target", target)
