"""The parts of the report, before they become HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import plotly.graph_objects as go

from tdhook_train.plots.charts import Chart

__all__ = ["Listing", "Picture", "Section"]


@dataclass(frozen=True, eq=False)
class Listing:
    """A table of words and numbers.

    Args:
        header: names of the columns.
        rows: what stands in them.
        title: what to open it by, where it is long; shown at once where empty.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True, eq=False)
class Picture:
    """A chart, a table or both under their title, with one or two sentences on how to read them.

    Args:
        title: what it shows.
        caption: how to read it, whatever the run.
        chart: what is drawn.
        note: what is to be said of this run.
        listings: tables under it.
    """

    title: str
    caption: str
    chart: Chart | None = None
    note: str = ""
    listings: tuple[Listing, ...] = ()

    @cached_property
    def figure(self) -> go.Figure | None:
        """The chart, drawn by plotly for a wide page."""
        return None if self.chart is None else self.chart.figure()


@dataclass(frozen=True, eq=False)
class Section:
    """Pictures that answer one question; without any, ``missing`` says why."""

    title: str
    pictures: tuple[Picture, ...] = ()
    missing: str = ""
