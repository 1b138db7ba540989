"""Images side by side: what an output looks at, beside what there is to see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tdhook_train.errors import KeyMissingError
from tdhook_train.plots.panels import ImagePanel
from tdhook_train.plots.style import MAP, frame, place, plain, short

__all__ = ["images"]

_SIDE = 250  # pixels


def images(panels: Sequence[ImagePanel], *, unit: str, columns: int | None = None) -> go.Figure:
    """Show images in one row; those that are maps share their colours, from 0 to the largest value of any.

    Args:
        panels: from left to right.
        unit: title of the colour bar.
        columns: how many stand in a row; all, if None.
    """
    if not panels:
        raise KeyMissingError("images was given no panel to draw")
    columns = min(columns or len(panels), len(panels))
    rows = place(len(panels) - 1, columns)[0]
    figure = make_subplots(rows, columns, subplot_titles=[plain(short(panel.title, 24)) for panel in panels])
    for number, panel in enumerate(panels):
        row, column = place(number, columns)
        colors = {"coloraxis": "coloraxis"} if panel.is_map else {"colorscale": "gray", "showscale": False}
        template = "row %{y}, column %{x}<br><b>%{z:.3g}</b><extra></extra>"
        figure.add_trace(go.Heatmap(z=panel.values, hovertemplate=template, **colors), row=row, col=column)
        across = f"x{number + 1}" if number else "x"
        figure.update_yaxes(autorange="reversed", scaleanchor=across, constrain="domain", row=row, col=column)
    largest = max((float(np.nanmax(panel.values, initial=0.0)) for panel in panels if panel.is_map), default=0.0)
    frame(figure, height=rows * (_SIDE + 40) + 50, top=40, legend=False)
    bar = {"title": {"text": plain(unit), "side": "right"}, "thickness": 14, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": MAP, "cmin": 0, "cmax": largest or 1.0, "colorbar": bar})
    figure.update_xaxes(constrain="domain", visible=False)
    figure.update_yaxes(visible=False)
    return figure
