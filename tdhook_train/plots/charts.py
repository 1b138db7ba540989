"""What a picture draws, by the shape of its data: one description for plotly, for matplotlib and for tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import plotly.graph_objects as go

from tdhook_train.plots.heat_map import heat_map
from tdhook_train.plots.images import images
from tdhook_train.plots.line_chart import line_chart
from tdhook_train.plots.panels import HeatPanel, ImagePanel, LinePanel, Mark

__all__ = ["Chart", "HeatChart", "ImageChart", "LineChart"]


@dataclass(frozen=True, eq=False)
class HeatChart:
    """Maps on the same colours; see :func:`heat_map`."""

    panels: Sequence[HeatPanel]
    unit: str
    limits: tuple[float, float] = (0.0, 1.0)
    legend: Mapping[str, str] = field(default_factory=dict)
    marks: Sequence[Mark] = ()

    def figure(self, columns: int = 2) -> go.Figure:
        """Draw it with plotly."""
        return heat_map(
            self.panels, unit=self.unit, limits=self.limits, legend=self.legend, marks=self.marks, columns=columns
        )


@dataclass(frozen=True, eq=False)
class LineChart:
    """Series over training; see :func:`line_chart`."""

    panels: Sequence[LinePanel]
    marks: Sequence[Mark] = ()
    at: Sequence[float] | None = None

    def figure(self, columns: int = 2) -> go.Figure:
        """Draw it with plotly."""
        return line_chart(self.panels, marks=self.marks, at=self.at, columns=columns)


@dataclass(frozen=True, eq=False)
class ImageChart:
    """Images side by side; see :func:`images`."""

    panels: Sequence[ImagePanel]
    unit: str

    def figure(self, columns: int = 2) -> go.Figure:
        """Draw it with plotly; ``columns`` of 1 stand for a narrow page, on which two images have room in a row."""
        return images(self.panels, unit=self.unit, columns=len(self.panels) if columns > 1 else 2)


Chart: TypeAlias = HeatChart | LineChart | ImageChart
