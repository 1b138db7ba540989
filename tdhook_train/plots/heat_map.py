"""Heat maps of layers over training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from tdhook_train.errors import KeyMissingError
from tdhook_train.plots.labels import thin_out
from tdhook_train.plots.panels import Array, HeatPanel, Mark
from tdhook_train.plots.step_axis import edges, positions
from tdhook_train.plots.style import GREY, MAP, frame, grid, mark_lines, place, plain, step_axes

__all__ = ["ceiling", "heat_map"]

_MOST_LABELS = 32


def heat_map(
    panels: Sequence[HeatPanel],
    *,
    unit: str,
    limits: tuple[float, float] = (0.0, 1.0),
    legend: Mapping[str, str] | None = None,
    marks: Sequence[Mark] = (),
) -> go.Figure:
    """Show what each layer scores at each step, one panel a network, all on the same colours.

    Args:
        panels: two stand side by side; layers run upward, from the input to the output.
        unit: title of the colour bar.
        limits: values at the ends of the colour map; what lies beyond has the colour of the end.
        legend: what ``grey`` cells and ``dots`` mean.
        marks: events drawn as vertical lines.

    Returns:
        The figure. Its ``layout.meta`` holds the axis settings for both scales of the steps.
    """
    if not panels:
        raise KeyMissingError("heat_map was given no panel to draw")
    figure = grid([panel.title for panel in panels], spacing=0.13)
    for number, panel in enumerate(panels):
        _draw(figure, panel, place(number))
    _legend(figure, legend or {})
    body = max(_body(panel) for panel in panels)
    frame(figure, height=place(len(panels) - 1)[0] * (body + 96) + 40, top=76 if legend else 40, legend=bool(legend))
    bar = {"title": {"text": plain(unit), "side": "right"}, "thickness": 14, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": MAP, "cmin": limits[0], "cmax": limits[1], "colorbar": bar})
    figure.update_yaxes(showgrid=False, zeroline=False)
    step_axes(figure, [border for panel in panels for border in edges(panel.steps)[[0, -1]]])
    mark_lines(figure, marks)
    return figure


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
    texts = [plain(panel.rows[position]) for position in shown]
    if panel.below:
        values, texts = [sum(panel.under) / 2, *values], [plain(panel.below[0]), *texts]
    span = [panel.under[0] if panel.below else 0, len(panel.rows)]
    axis = {"tickmode": "array", "tickvals": values, "ticktext": texts, "range": span, "tickfont": {"size": 11}}
    figure.update_yaxes(axis, row=at[0], col=at[1])


def _traces(panel: HeatPanel) -> Iterator[go.Heatmap | go.Scatter]:
    borders, layers = edges(panel.steps), np.arange(len(panel.rows) + 1, dtype=np.float64)
    if panel.hidden.any():
        hidden = np.where(panel.hidden, 1.0, np.nan)
        yield go.Heatmap(
            x=borders, y=layers, z=hidden, colorscale=[[0, GREY], [1, GREY]], showscale=False, hoverinfo="skip"
        )
    yield go.Heatmap(x=borders, y=layers, z=panel.shown, coloraxis="coloraxis", **_hover(panel))
    if panel.below:
        label, values = panel.below
        template = f"<b>{plain(label)}</b><br>step %{{customdata[0]:,}}<br>%{{customdata[1]:.3f}}<extra></extra>"
        data = np.stack([panel.steps, values], -1)[None]
        yield go.Heatmap(
            x=borders, y=panel.under, z=values[None], coloraxis="coloraxis", customdata=data, hovertemplate=template
        )
    if panel.dots is not None:
        row, column = panel.stippled
        yield _dots(positions(panel.steps)[column], np.asarray(row + 0.5))


def _hover(panel: HeatPanel) -> dict[str, object]:
    """Return text and numbers of each cell; plotly formats the numbers, so that the page stays small."""
    names = panel.names or panel.rows
    steps = np.broadcast_to(panel.steps, panel.values.shape)
    numbers = [steps, panel.values, *panel.hover.values()]
    named = "".join(
        f"<br>{plain(name)}: %{{customdata[{place}]:.3f}}" for place, name in enumerate(panel.hover, start=2)
    )
    return {
        "text": [[plain(name)] * len(panel.steps) for name in names],
        "customdata": np.stack(numbers, -1).astype(np.float32),
        "hovertemplate": "<b>%{text}</b><br>step %{customdata[0]:,}<br><b>%{customdata[1]:.3f}</b>"
        + named
        + "<extra></extra>",
        "hoverongaps": True,
    }


def _dots(x: Array, y: Array) -> go.Scatter:
    marker = {"size": 4, "color": "white", "line": {"color": "rgba(0,0,0,.5)", "width": 1}}
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, hoverinfo="skip", showlegend=False)


def _legend(figure: go.Figure, legend: Mapping[str, str]) -> None:
    looks = {
        "grey": {"symbol": "square", "size": 13, "color": GREY},
        "dots": {"size": 5, "color": "white", "line": {"color": "black", "width": 1}},
    }
    for look, text in legend.items():
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=looks[look], name=plain(text)))
