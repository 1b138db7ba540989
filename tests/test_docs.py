"""Every Python block of the documentation runs as written, and what it names is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tdhook_train import errors

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "api" not in path.parts)
PROSE = [*PAGES, ROOT / "README.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(path.read_text()) if kind == language]


@pytest.mark.filterwarnings("ignore")  # of what Lightning and TorchRL say of short trainings
@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=name)
def test_the_blocks_of_a_page_run_in_order(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    for number, text in enumerate(blocks(path, "python")):
        exec(compile(text, f"{path.name}, block {number}", "exec", dont_inherit=True), vars(page))


@pytest.mark.parametrize("path", PROSE, ids=name)
def test_what_a_page_points_to_exists(path):
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for file in re.findall(r"\b(?:tests|bench|examples)/[\w/]+\.py\b", text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("path", PROSE, ids=name)
def test_the_commands_of_a_page_are_there(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = {file.stem for file in (ROOT / "tdhook_train" / "cli").glob("*.py")}
    text = path.read_text()
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    assert set(re.findall(r"(?:^|`)tdhook-train ([a-z]+)", text, re.MULTILINE)) <= commands


def test_every_error_has_its_section():
    sections = re.findall(r"^## `(\w+)`$", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(name for name in errors.__all__ if name[0].isupper())
