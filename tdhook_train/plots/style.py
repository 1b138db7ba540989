"""Colours, fonts and the frame that every plotly figure shares."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tdhook_train.plots.panels import Mark
from tdhook_train.plots.step_axis import SCALES, plotly_axis, positions

__all__ = [
    "DARK",
    "FAINT",
    "FEW",
    "GREY",
    "INK",
    "MAP",
    "PALETTE",
    "TEMPLATE",
    "frame",
    "grid",
    "in_template",
    "mark_lines",
    "place",
    "plain",
    "short",
    "step_axes",
    "veil",
    "wrapped",
]

FEW = 20  # points of a line that are drawn one by one
INK = "#1f2933"
GREY = "#d9dce0"  # cells without evidence: no colour of the map is near it
FAINT = "#b8bfc7"
MAP = "viridis"  # perceptually uniform, and readable without colour vision
# Okabe and Ito's colours, which readers without full colour vision can tell apart, without their yellow
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
# What the report makes of these colours on a dark page; fills that let the page through need none.
DARK = {
    INK: "#e4e7eb",
    GREY: "#474e56",
    FAINT: "#5f6973",
    "white": "#15191e",
    **dict(
        zip(
            PALETTE,
            ("#4aa8e0", "#f0883e", "#2fc796", "#df9cc3", "#f2b53c", "#8ccdf2", "#b48fd0", "#c8a55f"),
            strict=True,
        )
    ),
}
# The report's own, once a page, instead of a template of 7 kB in every figure.
TEMPLATE = {
    "layout": {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": {"gridcolor": "rgba(130,140,150,.18)"},
        "yaxis": {"gridcolor": "rgba(130,140,150,.18)"},
    }
}
_SMALL = {"size": 11}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def plain(text: str) -> str:
    """Return a label as plotly shows it literally: it reads tags and, in dollars, formulas otherwise."""
    return escape(text, quote=False).replace("$", "&#36;")


def short(text: str, most: int = 30) -> str:
    """Return a label that has room on an axis, its middle left out where it is long: paths differ at their ends."""
    return text if len(text) <= most else f"{text[: most // 3]}…{text[len(text) - most + most // 3 + 1 :]}"


def wrapped(text: str, width: int = 60) -> str:
    """Return a label as plotly's hover shows it literally, over several lines where it is long."""
    return "<br>".join(plain(text[at : at + width]) for at in range(0, max(len(text), 1), width))


def in_template(text: str) -> str:
    """Return a label as a hover template shows it literally: plotly would fill in what looks like a variable."""
    return wrapped(text).replace("%{", "&#37;{")


def veil(color: str) -> str:
    """Return a colour that lets what lies behind it through."""
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def place(number: int, columns: int = 2) -> tuple[int, int]:
    """Return the row and column, from 1, of a figure's panel."""
    return number // columns + 1, number % columns + 1


def grid(titles: Sequence[str], *, spacing: float, columns: int = 2) -> go.Figure:
    """Return an empty figure with a panel for each title."""
    rows, cols = place(len(titles) - 1, columns)[0], min(len(titles), columns)
    specs: list[list[dict[str, Any] | None]] = [
        [{} if row * cols + col < len(titles) else None for col in range(cols)] for row in range(rows)
    ]
    named = [plain(short(title, 56)) for title in titles]
    gaps = {"horizontal_spacing": spacing, "vertical_spacing": 0.35 / rows}
    return make_subplots(rows=rows, cols=cols, specs=specs, subplot_titles=named, **gaps)


def frame(figure: go.Figure, *, height: int, top: int, legend: bool) -> None:
    """Give a figure the report's look."""
    figure.update_layout(
        height=height,
        template="plotly_white",
        font={"family": _FONT, "size": 13, "color": INK},
        margin={"l": 20, "r": 20, "t": top, "b": 52},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
        showlegend=legend,
        hoverlabel={"bgcolor": "white", "font": {"family": _FONT, "size": 12}, "align": "left"},
        hovermode="closest",
    )
    for title, axis in zip(figure.layout.annotations, figure.select_xaxes(), strict=False):
        title.update(x=axis.domain[0], xanchor="left", font_size=14)  # the middle is left to the marks
    figure.update_xaxes(automargin=True, showline=True, linecolor=FAINT, ticks="outside", tickcolor=FAINT)
    figure.update_yaxes(automargin=True)


def step_axes(figure: go.Figure, borders: Sequence[float]) -> None:
    """Let every horizontal axis count optimizer steps; the page's log/linear switch reads ``layout.meta``."""
    figure.update_xaxes(title_text="optimizer steps", title_standoff=8, **plotly_axis("log", borders))
    names = ["xaxis" + axis.plotly_name.removeprefix("xaxis") for axis in figure.select_xaxes()]
    switch: dict[str, Any] = {
        scale: {f"{name}.{key}": value for name in names for key, value in plotly_axis(scale, borders).items()}
        for scale in SCALES
    }
    figure.update_layout(meta=switch)


def mark_lines(figure: go.Figure, marks: Sequence[Mark], at: Sequence[float] | None = None) -> None:
    """Draw a dashed line for each mark in every panel, at its step unless ``at`` says where."""
    steps = positions(np.array([mark.step for mark in marks])).tolist()
    for mark, x in zip(marks, steps if at is None else at, strict=True):
        figure.add_vline(x=x, line={"color": "white", "width": 3}, opacity=0.6)  # seen on dark cells too
        figure.add_vline(
            x=x,
            line={"color": INK, "width": 1.2, "dash": "dash"},
            # a label of the line itself: an annotation would have to move when the axis changes its scale
            label={
                "text": plain(short(mark.text)),
                "textposition": "end",
                "textangle": 0,
                "yanchor": "bottom",
                "font": _SMALL,
            },
        )
