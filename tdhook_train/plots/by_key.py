"""Plots of one key of an artifact, for notebooks: chosen by the shape of the data, with the artifact's own labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tdhook_train.errors import KeyMissingError, SettingsError, did_you_mean
from tdhook_train.plots.axes import BODY, SMALL, draw_heat, draw_lines
from tdhook_train.plots.heat_map import heat_map
from tdhook_train.plots.line_chart import line_chart
from tdhook_train.plots.one_run import artifacts_by_run
from tdhook_train.plots.panels import HeatPanel
from tdhook_train.plots.several import heat_panels_together, line_panels_together
from tdhook_train.plots.shapes import heat_panels, line_panel
from tdhook_train.plots.source import Key, Table, read
from tdhook_train.plots.style import INK, short

if TYPE_CHECKING:
    from tdhook_train.buffer import Artifact

__all__ = ["heat", "lines"]

Artifacts: TypeAlias = "Artifact | Mapping[str, Artifact]"
Backend: TypeAlias = Literal["plotly", "matplotlib"] | Axes
_MOST_PANELS = 16


def heat(
    artifact: Artifacts,
    key: Key,
    *,
    at: Mapping[str, Any] | None = None,
    rows: str = "layer",
    limits: tuple[float, float] | None = None,
    backend: Backend = "plotly",
) -> Any:
    """Show a key as a map: a row of cells for each label, a column for each step.

    Of three runs or more, the mean at the steps that all have; the hover has its 95 % interval. Of two, each.

    Args:
        artifact: what ``buffer["probe"]`` gives; or several runs' by name, say by seed. A merged one is several.
        key: the measurement, for instance ``"r2"`` or ``("attr", "input")``.
        at: labels of dimensions that are not to be shown whole, for instance ``{"target": "value"}``, or ``"mean"`` to
            average over one: ``{"batch": "mean"}``.
        rows: the dimension that runs up the map; the last one, where the key has no such. Where one more is left,
            each of its labels has a panel; layers of several networks have a panel each.
        limits: values at the ends of the colours; the least and the largest, if None.
        backend: ``"plotly"``, ``"matplotlib"``, or matplotlib axes to draw on.

    Returns:
        A plotly figure; of matplotlib the axes, in an array where there are several.

    Raises:
        KeyMissingError: there is no such key, or no row.
        SettingsError: the key has other dimensions, or no number; the message says which.

    Example:
        >>> figure = heat(buffer["probe"], "r2", at={"target": "y"})
        >>> figure.write_html("r2.html")
    """
    panels = heat_panels_together(
        {
            label: [panel for title, table in _tables(one, key, at, rows) for panel in heat_panels(table, title=title)]
            for label, one in _by_run(artifact).items()
        }
    )
    limits = limits or _extent(panels, key)
    unit = _shown(key)
    if backend == "plotly":
        return heat_map(panels, unit=unit, limits=limits)
    axes = _axes(backend, [panel.title for panel in panels])
    for own, panel in zip(axes, panels, strict=True):
        mesh = draw_heat(own, panel, limits=limits)
        if not isinstance(backend, Axes):
            own.figure.colorbar(mesh, ax=own, label=unit)
    return _one_or_all(axes)


def lines(
    artifact: Artifacts,
    key: Key,
    *,
    at: Mapping[str, Any] | None = None,
    over: str = "layer",
    backend: Backend = "plotly",
) -> go.Figure | Any:
    """Show a key as lines over steps: one for each label of a dimension.

    Of three runs or more, each line is the mean with its 95 % interval; of two, the runs differ in dashes.

    Args:
        artifact: what ``buffer["probe"]`` gives; or several runs' by name, say by seed. A merged one is several.
        key: the measurement, for instance ``"r2"`` or ``("meta", "cost")``.
        at: labels of dimensions that are not to be shown whole, for instance ``{"target": "value"}``, or ``"mean"`` to
            average over one: ``{"batch": "mean"}``.
        over: the dimension that has a line for each label; the last one, where the key has no such. Where one more is
            left, each of its labels has a panel.
        backend: ``"plotly"``, ``"matplotlib"``, or matplotlib axes to draw on.

    Returns:
        A plotly figure; of matplotlib the axes, in an array where there are several.

    Raises:
        KeyMissingError: there is no such key, or no row.
        SettingsError: the key has other dimensions, or no number; the message says which.

    Example:
        >>> figure = lines({"seed 0": run0["health"], "seed 1": run1["health"]}, "effective_rank")
    """
    panels = line_panels_together(
        {
            label: [
                line_panel(table, title=title, unit=_shown(key))
                for title, table in _tables(one, key, at, over, least=0)
            ]
            for label, one in _by_run(artifact).items()
        }
    )
    if backend == "plotly":
        return line_chart(panels)
    axes = _axes(backend, [panel.title for panel in panels])
    for own, panel in zip(axes, panels, strict=True):
        draw_lines(own, panel)
        own.set_xlabel("optimizer steps", fontsize=BODY, color=INK)
    return _one_or_all(axes)


def _shown(key: Key) -> str:
    return key if isinstance(key, str) else ".".join(key)


def _by_run(artifact: Artifacts) -> dict[str, Artifact]:
    given = dict(artifact) if isinstance(artifact, Mapping) else {"": artifact}
    if not given:
        raise SettingsError("there is no run to draw")
    return {
        " / ".join(part for part in (str(label), inner) if part): one
        for label, whole in given.items()
        for inner, one in artifacts_by_run(whole, "").items()
    }


def _tables(
    artifact: Artifact, key: Key, at: Mapping[str, Any] | None, along: str, *, least: int = 1
) -> Iterator[tuple[str, Table]]:
    """Yield a table of one dimension, or of none where ``least`` allows it, for each panel, with its title."""
    artifact.dims(key)  # a key that is not there is said before that there are no rows
    if not len(artifact):
        raise KeyMissingError(f"there is no row of {_shown(key)!r} to draw yet")
    if isinstance(artifact.series(key), list):
        raise SettingsError(f"{_shown(key)!r} is kept in files, which have no numbers to draw")
    table = _reduced(read(artifact, key), key, at or {})
    wanted = along if along in table.dims else (table.dims[-1] if table.dims else "")
    others = [dim for dim in table.dims if dim != wanted]
    if len(table.dims) < least or len(others) > 1:
        need = "1 or 2" if least else "at most 2"
        has = ", ".join(f"{dim} ({len(table.labels[dim])})" for dim in table.dims) or "none"
        hint = (
            f"; choose with at={{{others[0]!r}: label}}, or average with at={{{others[0]!r}: 'mean'}}" if others else ""
        )
        raise SettingsError(f"{_shown(key)!r} has the dimensions {has} beside the steps, expected {need}{hint}")
    if not others:
        yield "", table
        return
    labels = table.labels[others[0]]
    if len(labels) > _MOST_PANELS:
        raise SettingsError(
            f"{_shown(key)!r} would have a panel for each of {len(labels)} labels of {others[0]!r}; choose one with "
            f"at={{{others[0]!r}: label}}, or average with at={{{others[0]!r}: 'mean'}}"
        )
    for label in labels:
        yield label, table.pick(others[0], label)


def _reduced(table: Table, key: Key, at: Mapping[str, Any]) -> Table:
    for dim, label in at.items():
        if dim not in table.dims:
            hint = did_you_mean(dim, table.dims)
            raise SettingsError(
                f"{_shown(key)!r} has no dimension {dim!r}{hint}; it has {', '.join(table.dims) or 'none'}"
            )
        if str(label) in table.labels[dim]:
            table = table.pick(dim, str(label))
        elif label == "mean":
            axis = table.dims.index(dim)
            values = table.values.mean(axis + 1)
            table = replace(table, values=values, dims=(*table.dims[:axis], *table.dims[axis + 1 :]))
        else:
            known = table.labels[dim]
            hint = did_you_mean(str(label), known)
            raise SettingsError(f"{dim!r} of {_shown(key)!r} has no label {label!r}{hint}; it has {_some(known)}")
    return table


def _some(labels: list[str]) -> str:
    return ", ".join(map(repr, labels[:8])) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")


def _extent(panels: list[HeatPanel], key: Key) -> tuple[float, float]:
    known = [panel.values[np.isfinite(panel.values)] for panel in panels]
    flat = np.concatenate(known) if known else np.empty(0)
    if not flat.size:
        raise SettingsError(f"{_shown(key)!r} has no finite number to draw")
    low, high = float(flat.min()), float(flat.max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _axes(backend: Backend, titles: list[str]) -> list[Axes]:
    if isinstance(backend, Axes):
        if len(titles) > 1:
            raise SettingsError(f"there are {len(titles)} panels for one axes: {_some(titles)}; choose one with at=")
        return [backend]
    if backend != "matplotlib":
        raise SettingsError(f"backend={backend!r} is neither 'plotly' nor 'matplotlib' nor matplotlib's axes")
    columns = min(len(titles), 2)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(7.0 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, number) for number in range(1, len(titles) + 1)]
    for own, title in zip(axes, titles, strict=True):
        own.set_title(short(title, 60), fontsize=BODY, loc="left", color=INK).set_parse_math(False)
        own.tick_params(labelsize=SMALL)
    return axes


def _one_or_all(axes: list[Axes]) -> Any:
    if len(axes) == 1:
        return axes[0]
    held = np.empty(len(axes), dtype=object)
    held[:] = axes
    return held
