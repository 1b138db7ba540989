"""The HTML page around the figures: one file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tdhook_train.plots.sections.section import Picture, Section

__all__ = ["page"]

_CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1.5rem 1.5rem 5rem; max-width: 1180px; color: #1f2933; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid #d9dce0; }
h3 { font-size: 1.05rem; margin: 2rem 0 .25rem; }
p { max-width: 76ch; margin: .25rem 0 .5rem; }
figure { margin: 0; }
figcaption, .missing { color: #52606d; font-size: .92rem; max-width: 88ch; }
.missing { font-style: italic; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: 0 0 1rem; }
dt { color: #52606d; font-size: .8rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
pre { background: #f5f7fa; padding: .75rem 1rem; overflow: auto; max-height: 24rem; font-size: .82rem; }
nav { position: sticky; top: 0; z-index: 2; background: #fffffff0; padding: .5rem 0; font-size: .9rem;
  display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; border-bottom: 1px solid #d9dce0; }
nav a { color: #0072b2; text-decoration: none; }
nav span { margin-left: auto; white-space: nowrap; }
.scroll { overflow-x: auto; }
.scroll > div { min-width: 720px; }
@media print { nav { display: none; } figure { break-inside: avoid; } }
"""

# every figure over steps carries the settings of both scales in layout.meta
_SWITCH = """
document.querySelectorAll('input[name=scale]').forEach(function (input) {
  input.addEventListener('change', function () {
    document.querySelectorAll('.plotly-graph-div').forEach(function (figure) {
      var scales = figure.layout && figure.layout.meta;
      if (scales && scales[input.value]) { Plotly.relayout(figure, scales[input.value]); }
    });
  });
});
"""
# the buttons left out include one that would send the figure to a server
_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "resetScale2d"]],
    "plotlyServerURL": "",
}


def page(
    title: str, facts: Mapping[str, str], settings: Mapping[str, object], sections: Sequence[Section]
) -> Iterator[str]:
    """Yield the page, piece by piece; every text in it is escaped.

    Args:
        title: heading of the page.
        facts: what a reader wants to know of the run first, shown in one line.
        settings: what was measured with, shown on demand as JSON.
        sections: what was found.
    """
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<style>{_CSS}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n<body>\n"
    yield f"<header>\n<h1>{escape(title)}</h1>\n"
    yield "<dl>" + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items())
    yield "</dl>\n"
    text = json.dumps(settings, indent=2, ensure_ascii=False, default=str)
    yield f"<details><summary>Settings of the methods</summary><pre>{escape(text)}</pre></details>\n</header>\n"
    yield from _navigation(sections)
    yield "<main>\n"
    for number, section in enumerate(sections):
        yield from _section(section, number)
    yield f"</main>\n<script>{_SWITCH}</script>\n</body>\n</html>\n"


def _navigation(sections: Sequence[Section]) -> Iterator[str]:
    links = (f'<a href="#s{number}">{escape(part.title)}</a>' for number, part in enumerate(sections) if part.pictures)
    choices = (
        f'<label><input type="radio" name="scale" value="{scale}"{checked}> {text}</label> '
        for scale, text, checked in (("log", "log(1 + step)", " checked"), ("linear", "linear", ""))
    )
    yield f"<nav>{''.join(links)}<span>step axis: {''.join(choices)}</span></nav>\n"


def _section(section: Section, number: int) -> Iterator[str]:
    yield f'<section id="s{number}">\n<h2>{escape(section.title)}</h2>\n'
    if section.missing:
        yield f'<p class="missing">{escape(section.missing)}</p>\n'
    for picture in section.pictures:
        yield from _picture(picture)
    yield "</section>\n"


def _picture(picture: Picture) -> Iterator[str]:
    yield f"<figure>\n<h3>{escape(picture.title)}</h3>\n"
    if picture.figure is not None:
        yield f'<div class="scroll">{_figure(picture.figure)}</div>\n'
    yield f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>\n"


def _figure(figure: go.Figure) -> str:
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG))
