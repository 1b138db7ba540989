"""Images side by side: what an output looks at, beside what there is to see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tdhook_train.errors import KeyMissingError
from tdhook_train.plots.panels import ImagePanel
from tdhook_train.plots.style import MAP, frame, plain

__all__ = ["images"]

_SIDE = 250  # pixels


def images(panels: Sequence[ImagePanel], *, unit: str) -> go.Figure:
    """Show images in one row; those that are maps share their colours, from 0 to the largest value of any.

    Args:
        panels: from left to right.
        unit: title of the colour bar.
    """
    if not panels:
        raise KeyMissingError("images was given no panel to draw")
    figure = make_subplots(1, len(panels), subplot_titles=[plain(panel.title) for panel in panels])
    for column, panel in enumerate(panels, 1):
        colors = {"coloraxis": "coloraxis"} if panel.is_map else {"colorscale": "gray", "showscale": False}
        template = "row %{y}, column %{x}<br><b>%{z:.3g}</b><extra></extra>"
        figure.add_trace(go.Heatmap(z=panel.values, hovertemplate=template, **colors), row=1, col=column)
        across = "x" if column == 1 else f"x{column}"
        figure.update_yaxes(autorange="reversed", scaleanchor=across, constrain="domain", row=1, col=column)
    largest = max((float(np.nanmax(panel.values, initial=0.0)) for panel in panels if panel.is_map), default=0.0)
    frame(figure, height=_SIDE + 90, top=40, legend=False)
    bar = {"title": {"text": plain(unit), "side": "right"}, "thickness": 14, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": MAP, "cmin": 0, "cmax": largest or 1.0, "colorbar": bar})
    figure.update_xaxes(constrain="domain", visible=False)
    figure.update_yaxes(visible=False)
    return figure
