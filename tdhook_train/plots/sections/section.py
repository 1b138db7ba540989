"""The parts of the report, before they become HTML."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

__all__ = ["Picture", "Section"]


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure under its title, with one or two sentences on how to read it."""

    title: str
    caption: str
    figure: go.Figure | None = None


@dataclass(frozen=True, eq=False)
class Section:
    """Pictures that answer one question; without any, ``missing`` says why."""

    title: str
    pictures: tuple[Picture, ...] = ()
    missing: str = ""
