"""Lines over training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from tdhook_train.errors import KeyMissingError
from tdhook_train.plots.panels import Line, LinePanel, Mark
from tdhook_train.plots.step_axis import edges, positions
from tdhook_train.plots.style import (
    FAINT,
    FEW,
    INK,
    frame,
    grid,
    in_template,
    mark_lines,
    place,
    plain,
    short,
    step_axes,
    veil,
)

__all__ = ["line_chart"]


def line_chart(
    panels: Sequence[LinePanel],
    *,
    marks: Sequence[Mark] = (),
    at: Sequence[float] | None = None,
    columns: int = 2,
) -> go.Figure:
    """Show series over training, several panels with one legend.

    Args:
        panels: all with the same horizontal axis.
        marks: events drawn as vertical lines.
        at: where the marks lie on the horizontal axis, for panels over frames.
        columns: how many panels stand side by side.

    Returns:
        The figure; a click on a name in the legend hides its line in every panel.
    """
    if not panels:
        raise KeyMissingError("line_chart was given no panel to draw")
    figure = grid([panel.title for panel in panels], spacing=0.1, columns=columns)
    named: set[str] = set()
    for number, panel in enumerate(panels):
        row, col = place(number, columns)
        for line in panel.lines:
            if line.low is not None and line.high is not None:
                figure.add_traces(_band(line, panel), rows=row, cols=col)
            figure.add_trace(_trace(line, panel, first=line.name not in named), row=row, col=col)
            named.add(line.name)
        axis = {"title": {"text": plain(short(panel.unit, 48)), "standoff": 8, "font": {"size": 12}}}
        figure.update_yaxes(axis, rangemode="tozero" if panel.floor == "zero" else "normal", row=row, col=col)
        if panel.limits:
            figure.update_yaxes(range=list(panel.limits), row=row, col=col)
    titled = any(panel.title for panel in panels)
    frame(figure, height=place(len(panels) - 1, columns)[0] * 320 + 60, top=76 if titled else 48, legend=len(named) > 1)
    figure.update_yaxes(zeroline=True, zerolinecolor=FAINT)
    _time_axes(figure, panels)
    mark_lines(figure, marks, at)
    return figure


def _time_axes(figure: go.Figure, panels: Sequence[LinePanel]) -> None:
    if panels[0].x == "frames":
        figure.update_xaxes(title_text="environment frames", title_standoff=8, rangemode="tozero")
        return
    found = [edges(np.asarray(line.x))[[0, -1]] for panel in panels for line in panel.lines if line.x.size]
    step_axes(figure, np.concatenate(found).tolist() if found else [1.0, 2.0])


def _trace(line: Line, panel: LinePanel, *, first: bool) -> go.Scatter:
    color = line.color or (FAINT if line.weight == "faint" else INK)
    width = 1 if line.weight == "faint" else 2.2
    ends = {} if line.low is None or line.high is None else {"from": line.low, "to": line.high}
    named = enumerate((*ends, *line.hover), 1)
    hover = "".join(f"<br>{in_template(name)}: %{{customdata[{number}]:.4g}}" for number, name in named)
    unit = "step" if panel.x == "step" else "frame"
    return go.Scatter(
        x=positions(line.x) if panel.x == "step" else line.x,
        y=line.y,
        name=plain(short(line.name, 48)),
        legendgroup=line.name,
        showlegend=first and line.weight != "faint",
        mode=_mode(line),
        line={"color": color, "width": width, "dash": line.style},
        marker={"color": color, "size": 11, "symbol": "diamond"}
        if line.weight == "markers"
        else {"color": color, "size": 5},
        stackgroup="all" if panel.kind == "stacked" else None,
        customdata=np.stack([line.x, *ends.values(), *line.hover.values()], -1),
        hovertemplate=f"<b>{in_template(line.name)}</b><br>{unit} %{{customdata[0]:,}}<br>%{{y:.4g}}{hover}"
        "<extra></extra>",
    )


def _band(line: Line, panel: LinePanel) -> list[go.Scatter]:
    """Return the two edges of an interval, the space between them filled."""
    x = positions(line.x) if panel.x == "step" else line.x
    edge = {"x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    edge["legendgroup"] = line.name
    return [go.Scatter(y=line.low, **edge), go.Scatter(y=line.high, fill="tonexty", fillcolor=_pale(line), **edge)]


def _pale(line: Line) -> str:
    return veil(line.color or INK)


def _mode(line: Line) -> str:
    if line.weight == "markers":
        return "markers"
    return "lines+markers" if np.isfinite(line.y).sum() <= FEW else "lines"
