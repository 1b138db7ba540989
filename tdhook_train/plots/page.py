"""The HTML page around the figures: one file that needs no network, and can be read without JavaScript."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tdhook_train.plots.numbers import listings
from tdhook_train.plots.sections.section import Listing, Picture, Section
from tdhook_train.plots.style import DARK, TEMPLATE

__all__ = ["page"]

# Nothing but what stands in the page itself, whatever a name in it says.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_SETTINGS: dict[str, Any] = {
    "dark": DARK,
    "template": TEMPLATE,
    # the buttons left out include one that would send the figure to a server
    "config": {
        "displaylogo": False,
        "responsive": True,
        "modeBarButtons": [["toImage", "resetScale2d"]],
        "plotlyServerURL": "",
    },
}


def page(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> Iterator[str]:
    """Yield the page, piece by piece; every text in it is escaped.

    Args:
        title: heading of the page.
        facts: what a reader wants to know first, shown in one line.
        sections: what was found.
    """
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<style>\n{_asset('report.css')}</style>\n<noscript><style>\n{_asset('no_script.css')}</style></noscript>\n"
    yield f"<script>{get_plotlyjs()}</script>\n"
    yield f'<script type="application/json" id="settings">{_inert(json.dumps(_SETTINGS))}</script>\n'
    yield f"<script>\n{_asset('report.js')}</script>\n</head>\n<body>\n<header>\n<h1>{escape(title)}</h1>\n"
    yield "<dl>" + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items())
    yield "</dl>\n<noscript><p>JavaScript is off: pictures are not drawn, their numbers stand in tables.</p></noscript>"
    yield "\n</header>\n"
    yield from _navigation(sections)
    yield "<main>\n"
    for number, section in enumerate(sections):
        yield from _section(section, f"s{number}")
    yield "</main>\n</body>\n</html>\n"


def _asset(name: str) -> str:
    return files("tdhook_train.plots").joinpath("assets", name).read_text(encoding="utf-8")


def _inert(text: str) -> str:
    """Return JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c")


def _navigation(sections: Sequence[Section]) -> Iterator[str]:
    links = (f'<a href="#s{number}">{escape(part.title)}</a>' for number, part in enumerate(sections) if part.pictures)
    choices = (
        f'<label><input type="radio" name="scale" value="{scale}"{checked}> {text}</label> '
        for scale, text, checked in (("log", "log(1 + step)", " checked"), ("linear", "linear", ""))
    )
    yield f"<nav>{''.join(links)}<span>step axis: {''.join(choices)}</span></nav>\n"


def _section(section: Section, name: str) -> Iterator[str]:
    yield f'<section id="{name}">\n<h2>{escape(section.title)}</h2>\n'
    if section.missing:
        yield f'<p class="missing">{escape(section.missing)}</p>\n'
    for number, picture in enumerate(section.pictures):
        yield from _picture(picture, f"{name}p{number}")
    yield "</section>\n"


def _picture(picture: Picture, name: str) -> Iterator[str]:
    yield f"<figure>\n<h3>{escape(picture.title)}</h3>\n"
    if picture.figure is not None:
        yield from _figure(picture, picture.figure, name)
    told = " ".join(part for part in (picture.note.strip(), picture.caption) if part)
    yield f"<figcaption>{escape(told)}</figcaption>\n</figure>\n"
    for listing in picture.listings:
        yield _table(listing, words=True)
    if picture.chart is not None:
        inside = "".join(_table(listing, words=False) for listing in listings(picture.chart))
        yield f'<details class="numbers"><summary>Numbers</summary>{inside}</details>\n' if inside else ""


def _figure(picture: Picture, drawn: go.Figure, name: str) -> Iterator[str]:
    wide = _plain(drawn)
    narrow = _plain(picture.chart.figure(1))["layout"] if picture.chart is not None else None
    height = int(wide["layout"]["height"])
    yield f'<div class="plot" id="{name}" data-figure="{name}d" style="height:{height}px"></div>\n'
    text = json.dumps({**wide, "narrow": narrow}, separators=(",", ":"))
    yield f'<script type="application/json" id="{name}d">{_inert(text)}</script>\n'
    yield f'<script>report("{name}")</script>\n'  # the first are drawn while the rest is still being read


def _plain(figure: go.Figure) -> dict[str, Any]:
    """Return a figure as plain values, without what the page has once: the template, and a name for each cell."""
    given: dict[str, Any] = json.loads(figure.to_json())
    given["layout"].pop("template", None)
    for trace in given["data"]:
        text = trace.get("text")
        if trace["type"] == "heatmap" and text and all(len(set(row)) == 1 for row in text):
            trace["meta"] = {"names": [row[0] for row in text], "columns": len(text[0])}
            del trace["text"]
    return given


def _table(listing: Listing, *, words: bool) -> str:
    """Return a table; one with a title in a block of its own that opens on demand."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in listing.header)
    body = "\n".join(_row(row) for row in listing.rows)
    kind = ' class="words"' if words else ""
    table = f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    if not listing.title:
        return table + "\n"
    if not words:
        return f"<h4>{escape(listing.title)}</h4>{table}\n"
    return f"<details><summary>{escape(listing.title)}</summary>{table}</details>\n"


def _row(row: Sequence[str]) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
    return f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>'
