"""Make the pictures of the family pages anew: each is what the blocks of its page leave.

python docs/pictures.py [page ...]
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

FAMILIES = Path(__file__).resolve().parent / "families"
FIRST = FAMILIES / "index.md"  # its block makes what the blocks of the others go by
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str = "python") -> list[str]:
    """Return the blocks of a page that are in a language."""
    return [text for kind, text in _BLOCK.findall(page.read_text()) if kind == language]


def run(page: Path) -> None:
    """Run the Python blocks of a page in the working directory, in order and in one namespace."""
    module = ModuleType("page")
    sys.modules["page"] = module  # what is defined in a block can be pickled
    pages = [FIRST, page] if page.parent == FAMILIES and page != FIRST else [page]
    for one in pages:
        for number, text in enumerate(blocks(one)):
            exec(compile(text, f"{one.name}, block {number}", "exec", dont_inherit=True), vars(module))


def main(names: list[str]) -> None:
    """Run the pages and keep their pictures beside them."""
    for page in sorted(FAMILIES.glob("*.md")):
        if page == FIRST or (names and page.stem not in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            run(page)
            shutil.copy(f"{page.stem}.png", FAMILIES)
            os.chdir(FAMILIES)


if __name__ == "__main__":
    main(sys.argv[1:])
