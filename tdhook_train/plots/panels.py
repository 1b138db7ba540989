"""What a picture shows, before any plotting library draws it: the HTML report and the PNG draw the same panels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "HeatPanel", "ImagePanel", "Line", "LinePanel", "Mark", "Mask", "Style"]

Array: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]
Style: TypeAlias = Literal["solid", "dash", "dot"]

_SLOTS = 26  # dots fit side by side in the width of a panel


@dataclass(frozen=True)
class Mark:
    """Something that happened during training, drawn as a vertical line on every time axis.

    Args:
        step: optimizer steps behind the weights at that moment.
        text: what happened, in a few words.
    """

    step: int
    text: str


@dataclass(frozen=True, eq=False)
class HeatPanel:
    """One network's numbers: a row of cells per layer, a column per measured step.

    Args:
        title: what the panel shows, e.g. the network's name.
        steps: measured steps, ascending, ``[steps]``.
        rows: short row labels, from the input to the output.
        values: ``[rows, steps]``.
        names: full row labels for the hover; ``rows`` where empty.
        grey: cells that carry no evidence, ``[rows, steps]``; cells without a number are always grey.
        dots: cells to be stippled, ``[rows, steps]``.
        below: label and values ``[steps]`` of one more row, drawn apart, under the others.
        hover: further numbers of each cell, by name, each ``[rows, steps]``.
        columns: labels of the columns of a map that is not over training; ``steps`` then counts them.
    """

    title: str
    steps: NDArray[np.int64]
    rows: list[str]
    values: Array
    names: list[str] = field(default_factory=list)
    grey: Mask | None = None
    dots: Mask | None = None
    below: tuple[str, Array] | None = None
    hover: Mapping[str, Array] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Full row labels."""
        return self.names or self.rows

    @property
    def under(self) -> tuple[float, float]:
        """Where the row under the layers lies, in rows from the first layer; high enough to be seen under hundreds."""
        height = max(1.0, len(self.rows) / 18)
        return -1.4 * height, -0.4 * height

    @property
    def hidden(self) -> Mask:
        """Cells drawn grey: those named so, and those without a number."""
        empty = ~np.isfinite(self.values)
        return empty if self.grey is None else empty | self.grey

    @property
    def shown(self) -> Array:
        """The values, NaN where a cell is grey."""
        return np.where(self.hidden, np.nan, self.values)

    @property
    def stippled(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows and columns of the cells that get a dot; of columns that lie close together, one stands for all."""
        if self.dots is None:
            return np.empty(0, np.intp), np.empty(0, np.intp)
        slots = np.floor(_SLOTS * np.log1p(self.steps) / max(np.log1p(self.steps[-1]), 1e-9))
        _, apart = np.unique(slots, return_index=True)
        row, column = np.nonzero((self.dots & ~self.hidden)[:, apart])
        return row, apart[column]


@dataclass(frozen=True, eq=False)
class ImagePanel:
    """One image.

    Args:
        title: what it shows, e.g. the step.
        values: ``[height, width]``, the first row on top.
        is_map: drawn in the colours of a quantity; otherwise a picture, in grey.
    """

    title: str
    values: Array
    is_map: bool = True


@dataclass(frozen=True, eq=False)
class Line:
    """One series over time.

    Args:
        name: what the legend calls it; the same name has the same entry in every panel.
        x: steps or frames, ascending.
        y: values; a gap where NaN.
        color: CSS colour; grey where empty.
        style: solid, or dashed for a bound or a second network.
        weight: ``faint`` lines stand behind and have no legend entry.
        hover: further numbers of each point, by name.
        low: lower end of an interval about each value; none where None.
        high: the upper end.
    """

    name: str
    x: NDArray[np.generic]
    y: Array
    color: str = ""
    style: Style = "solid"
    weight: Literal["normal", "faint", "markers"] = "normal"
    hover: Mapping[str, Array] = field(default_factory=dict)
    low: Array | None = None
    high: Array | None = None


@dataclass(frozen=True, eq=False)
class LinePanel:
    """Series that share two axes.

    Args:
        title: what the panel shows.
        unit: title of the vertical axis: the quantity and its unit.
        lines: the series.
        x: what the horizontal axis counts.
        kind: ``stacked`` fills the lines one on top of the other.
        limits: range of the vertical axis; found from the data where None.
        floor: where the vertical axis begins without ``limits``.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    x: Literal["step", "frames"] = "step"
    kind: Literal["lines", "stacked"] = "lines"
    limits: tuple[float, float] | None = None
    floor: Literal["zero", "data"] = "zero"
