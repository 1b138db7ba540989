"""What the wheel and the sdist hold."""

from __future__ import annotations

import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

from distributions import ROOT, build

from tdhook_train.cli.doctor import EXTRAS


def sources(folder: str) -> set[str]:
    """Return the files of a folder of the checkout, but for what running it leaves."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_a_wheel_holds_the_package_and_nothing_beside_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = {name.split("/")[0] for name in names if not name.startswith("tdhook_train/")}
        assert {name for name in names if name.startswith("tdhook_train/")} == sources("tdhook_train")
        assert {"tdhook_train/py.typed", "tdhook_train/plots/assets/report.js"} <= names
        assert f"{about}/licenses/LICENSE" in names
        assert "tdhook-train = tdhook_train.cli:main" in archive.read(f"{about}/entry_points.txt").decode()
        meta = Parser().parsestr(archive.read(f"{about}/METADATA").decode())
    assert set(meta.get_all("Provides-Extra")) == {*EXTRAS, "all", "dev"}
    assert meta["License-Expression"] == "MIT"
    assert meta["Requires-Python"] == ">=3.11"
    assert "# tdhook-train" in meta.get_payload()


def test_a_wheel_needs_none_of_what_extras_bring(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        needs = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
    bare = {line.split(">")[0].split("[")[0] for line in needs if "extra ==" not in line}
    assert {"torch", "tensordict", "torchrl"} <= bare
    assert bare.isdisjoint(package for packages in EXTRAS.values() for package in packages)


def test_an_sdist_is_enough_to_test_and_to_document(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    for folder in ("tdhook_train", "tests", "examples", "bench", "docs"):
        assert sources(folder) <= names, folder
    files = ("README.md", "LICENSE", "ARCHITECTURE.md", "CHANGELOG.md", "Makefile", "constraints.txt", "peers.txt")
    assert set(files) <= names


def test_the_wheel_of_the_sdist_is_that_of_the_checkout(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    assert contents(build("wheel", tree, tmp_path)) == contents(wheel)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
