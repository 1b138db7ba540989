"""Heat maps of layers over training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from tdhook_train.errors import KeyMissingError
from tdhook_train.plots.labels import thin_out
from tdhook_train.plots.panels import Array, HeatPanel, Mark
from tdhook_train.plots.step_axis import edges, positions
from tdhook_train.plots.style import (
    GREY,
    MAP,
    frame,
    grid,
    in_template,
    mark_lines,
    place,
    plain,
    short,
    step_axes,
    wrapped,
)

__all__ = ["borders", "ceiling", "heat_map"]

_MOST_LABELS = 32
_MOST_COLUMNS = 16


def heat_map(
    panels: Sequence[HeatPanel],
    *,
    unit: str,
    limits: tuple[float, float] = (0.0, 1.0),
    legend: Mapping[str, str] | None = None,
    marks: Sequence[Mark] = (),
    columns: int = 2,
) -> go.Figure:
    """Show what each layer scores at each step, one panel a network, all on the same colours.

    Args:
        panels: layers run upward, from the input to the output.
        unit: title of the colour bar.
        limits: values at the ends of the colour map; what lies beyond has the colour of the end.
        legend: what ``grey`` cells and ``dots`` mean.
        marks: events drawn as vertical lines.
        columns: how many panels stand side by side.

    Returns:
        The figure. Its ``layout.meta`` holds the axis settings for both scales of the steps.
    """
    if not panels:
        raise KeyMissingError("heat_map was given no panel to draw")
    figure = grid([panel.title for panel in panels], spacing=0.13, columns=columns)
    for number, panel in enumerate(panels):
        _draw(figure, panel, place(number, columns))
    _legend(figure, legend or {})
    body = max(_body(panel) for panel in panels)
    frame(
        figure,
        height=place(len(panels) - 1, columns)[0] * (body + 96) + 40,
        top=76 if legend else 40,
        legend=bool(legend),
    )
    bar = {"title": {"text": plain(unit), "side": "right"}, "thickness": 14, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": MAP, "cmin": limits[0], "cmax": limits[1], "colorbar": bar})
    figure.update_yaxes(showgrid=False, zeroline=False)
    if panels[0].columns:
        figure.update_xaxes(showgrid=False, zeroline=False)
        return figure
    step_axes(figure, [border for panel in panels for border in borders(panel)[[0, -1]]])
    mark_lines(figure, marks)
    return figure


def borders(panel: HeatPanel) -> Array:
    """Return the borders of a panel's columns on its horizontal axis."""
    return np.arange(len(panel.columns) + 1, dtype=np.float64) if panel.columns else edges(panel.steps)


def ceiling(panels: Sequence[HeatPanel]) -> float:
    """Return the end of a colour map from 0 for shares: the least of .1, .2, .5 and 1 that holds them all."""
    largest = max((float(np.nanmax(panel.shown, initial=0.0)) for panel in panels), default=0.0)
    return next((end for end in (0.1, 0.2, 0.5) if largest <= end), 1.0)


def _body(panel: HeatPanel) -> int:
    rows = len(panel.rows) + (2 if panel.below else 0)
    return int(np.clip(17 * rows, 120, 640))


def _draw(figure: go.Figure, panel: HeatPanel, at: tuple[int, int]) -> None:
    for trace in _traces(panel):
        figure.add_trace(trace, row=at[0], col=at[1])
    shown = thin_out(panel.rows, _MOST_LABELS)
    values = [position + 0.5 for position in shown]
    texts = [plain(short(panel.rows[position])) for position in shown]
    if panel.below:
        values, texts = [sum(panel.under) / 2, *values], [plain(short(panel.below[0])), *texts]
    span = [panel.under[0] if panel.below else 0, len(panel.rows)]
    axis = {"tickmode": "array", "tickvals": values, "ticktext": texts, "range": span, "tickfont": {"size": 11}}
    figure.update_yaxes(axis, row=at[0], col=at[1])
    if panel.columns:
        shown = thin_out(panel.columns, _MOST_COLUMNS)
        texts = [plain(short(panel.columns[position], 16)) for position in shown]
        across = {"tickmode": "array", "tickvals": [position + 0.5 for position in shown], "ticktext": texts}
        figure.update_xaxes(across, tickangle=-60, tickfont={"size": 10}, row=at[0], col=at[1])


def _traces(panel: HeatPanel) -> Iterator[go.Heatmap | go.Scatter]:
    across, layers = borders(panel), np.arange(len(panel.rows) + 1, dtype=np.float64)
    if panel.hidden.any():
        hidden = np.where(panel.hidden, 1.0, np.nan).astype(np.float32)
        yield go.Heatmap(
            x=across, y=layers, z=hidden, colorscale=[[0, GREY], [1, GREY]], showscale=False, hoverinfo="skip"
        )
    shown = panel.shown.astype(np.float32)  # what the colours can tell apart, in half the room
    yield go.Heatmap(x=across, y=layers, z=shown, coloraxis="coloraxis", **_hover(panel))
    if panel.below:
        label, values = panel.below
        template = f"<b>{in_template(label)}</b><br>step %{{customdata[0]:,}}<br>%{{customdata[1]:.3f}}<extra></extra>"
        data = np.stack([panel.steps, values], -1)[None]
        yield go.Heatmap(
            x=across, y=panel.under, z=values[None], coloraxis="coloraxis", customdata=data, hovertemplate=template
        )
    if panel.dots is not None:
        row, column = panel.stippled
        yield _dots(positions(panel.steps)[column], np.asarray(row + 0.5))


def _hover(panel: HeatPanel) -> dict[str, object]:
    """Return text and numbers of each cell; plotly formats the numbers, so that the page stays small."""
    steps = np.broadcast_to(panel.steps, panel.values.shape)
    numbers = [steps, panel.values, *panel.hover.values()]
    named = "".join(
        f"<br>{in_template(name)}: %{{customdata[{place}]:.3f}}" for place, name in enumerate(panel.hover, start=2)
    )
    text = [[wrapped(name)] * len(panel.steps) for name in panel.labels]
    if panel.columns:
        beside = [wrapped(name) for name in panel.columns]
        text = [[f"{name}</b><br>and <b>{other}" for other, name in zip(beside, row, strict=True)] for row in text]
    when = "" if panel.columns else "<br>step %{customdata[0]:,}"
    return {
        "text": text,
        "customdata": np.stack(numbers, -1).astype(np.float32),
        "hovertemplate": f"<b>%{{text}}</b>{when}<br><b>%{{customdata[1]:.3f}}</b>" + named + "<extra></extra>",
        "hoverongaps": True,
    }


def _dots(x: Array, y: Array) -> go.Scatter:
    marker = {"size": 4, "color": "#fff", "line": {"color": "rgba(0,0,0,.5)", "width": 1}}
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, hoverinfo="skip", showlegend=False)


def _legend(figure: go.Figure, legend: Mapping[str, str]) -> None:
    looks = {
        "grey": {"symbol": "square", "size": 13, "color": GREY},
        "dots": {"size": 5, "color": "#fff", "line": {"color": "black", "width": 1}},
    }
    for look, text in legend.items():
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=looks[look], name=plain(text)))
