"""How Sphinx builds the documentation; `make docs` runs it."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

project = "tdhook-train"
author = "tdhook-train developers"
release = metadata.version("tdhook-train")
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["README.md"]
html_theme = "furo"
html_title = f"tdhook-train {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes and units, which types do not
autodoc_default_options = {
    "members": True,
    "exclude-members": "set_at_, set_, update_, update_if_present, submit_update_if_present",
}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3


def plain_asterisks(_app: object, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Let an asterisk be one, as in ``[row, *shape]`` of a line without quotes: docstrings here emphasise nothing."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``|\\.|:\w+ .*?:)", line)
        lines[i] = "".join(part if number % 2 else part.replace("*", r"\*") for number, part in enumerate(parts))


def setup(app: Any) -> None:
    """Have it done after Google's sections were read."""
    app.connect("autodoc-process-docstring", plain_asterisks, priority=600)
