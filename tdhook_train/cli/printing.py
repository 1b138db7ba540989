"""What is printed: tables by rich on a terminal, and plain aligned text, without colours, in a pipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = ["Table", "clean", "columns_wide", "complain", "on_terminal", "say", "size"]

_BROKEN_PIPE = 141  # what a shell shows of a program that SIGPIPE ended


@dataclass(frozen=True)
class Table:
    """Cells under names.

    Args:
        columns: their names.
        rows: texts.
        text: the columns that are aligned to the left.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Sequence[str] = ()

    def print(self) -> None:
        """Print it."""
        if not on_terminal():
            say(self.plain())
            return
        from rich.console import Console

        Console().print(self.rich())

    def plain(self) -> str:
        """Return it as aligned text."""
        lines = [[clean(cell) for cell in line] for line in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(self._aligned(line, widths)).rstrip() for line in lines)

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> list[str]:
        cells = zip(line, widths, strict=True)
        return [cell.ljust(width) if self._is_text(i) else cell.rjust(width) for i, (cell, width) in enumerate(cells)]

    def _is_text(self, column: int) -> bool:
        return self.columns[column] in self.text

    def rich(self) -> RichTable:
        """Return it as rich has it."""
        from rich.table import Table as RichTable
        from rich.text import Text  # not markup: names that come from a run may hold brackets

        table = RichTable(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for i, name in enumerate(self.columns):
            table.add_column(Text(clean(name)), justify="left" if self._is_text(i) else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        return table


def on_terminal() -> bool:
    """Whether a person reads what is printed."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def columns_wide() -> int:
    """How many characters fit on a line."""
    return shutil.get_terminal_size().columns


def say(text: object = "") -> None:
    """Print a line; end quietly where nobody reads any more, as behind ``| head``."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        # what Python itself still has to write at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(_BROKEN_PIPE) from None


def complain(text: str) -> None:
    """Print a line beside the output."""
    typer.echo(clean(text), err=True)


def clean(text: str) -> str:
    """Return a text that comes from a run without what would move a terminal's cursor or colour it."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
