"""Every Python block of the documentation runs as written, and what it names is there."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tdhook_train import errors

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FAMILIES = DOCS / "families"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "api" not in path.parts)
OF_A_FAMILY = [path for path in PAGES if path.parent == FAMILIES and path.stem != "index"]
PROSE = [*PAGES, ROOT / "README.md"]
blocks, run = (runpy.run_path(str(DOCS / "pictures.py"))[name] for name in ("blocks", "run"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore")  # of what Lightning and TorchRL say of short trainings
@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path)], ids=name)
def test_the_blocks_of_a_page_run_in_order(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "page", None)
    run(path)
    if path in OF_A_FAMILY:  # what it shows is what it makes
        with Image.open(f"{path.stem}.png") as made, Image.open(FAMILIES / f"{path.stem}.png") as kept:
            assert abs(made.width - kept.width) <= 8  # labels may be a digit longer
            assert made.height == kept.height


@pytest.mark.parametrize("path", OF_A_FAMILY, ids=name)
def test_a_page_of_a_family_has_what_each_has(path):
    (block,) = blocks(path)
    assert len(block.splitlines()) <= 20
    text = path.read_text()
    assert f"]({path.stem}.png)" in text
    assert "\n## When not to use it\n" in text
    assert f"({path.stem}.md)" in (FAMILIES / "index.md").read_text()


def test_every_method_is_on_the_page_of_its_family():
    rows = (ROOT / "README.md").read_text().split("## What it measures")[1].split("\n\n")[1]
    methods = {method for row in rows.splitlines() for method in re.findall(r"`([A-Z]\w+)`", row.split("|")[2])}
    assert len(methods) > 60
    tables = "\n".join(line for path in OF_A_FAMILY for line in path.read_text().splitlines() if line.startswith("| `"))
    assert sorted(methods - set(re.findall(r"`(\w+)`", tables))) == []


def test_pictures_are_small():
    assert sum(path.stat().st_size for path in FAMILIES.glob("*.png")) < 600_000


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


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="`make docs` installs it")
    pytest.importorskip("furo", reason="`make docs` installs it")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(tmp_path / "known")]
    done = subprocess.run([*command, str(DOCS), str(tmp_path / "html")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "families" / "probing.html").exists()


def test_every_error_has_its_section():
    sections = re.findall(r"^## `(\w+)`$", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(name for name in errors.__all__ if name[0].isupper())
