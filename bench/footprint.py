"""What an installation takes beyond torch: megabytes and files, of everything that pip would bring.

Nothing is installed but into a temporary folder, which is counted and removed. A few gigabytes may be downloaded.

    python bench/footprint.py [package ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _results import Row, asking, keep

ROOT = Path(__file__).resolve().parents[1]
OURS = "tdhook-train"
PACKAGES = {OURS: str(ROOT), f"{OURS}[all]": f"{ROOT}[all]"} | {
    name: name for name in ("captum", "nnsight", "transformer_lens", "tdhook")
}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


class Footprint(NamedTuple):
    """What was counted."""

    packages: int
    megabytes: float
    files: int


def resolved(wanted: str, constraints: Path) -> dict[str, str]:
    """Return what pip would install, by name: how it asks for it.

    Raises:
        RuntimeError: pip finds no way; its last line says why.
    """
    command = [
        *PIP,
        "install",
        "-q",
        "--dry-run",
        "--ignore-installed",
        "--report",
        "-",
        "-c",
        str(constraints),
        wanted,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found: list[dict[str, Any]] = json.loads(done.stdout)["install"]
    return {_normal(one["metadata"]["name"]): _requirement(one) for one in found}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _requirement(one: dict[str, Any]) -> str:
    if "dir_info" in one["download_info"]:  # this checkout
        return str(ROOT)
    return f"{one['metadata']['name']}=={one['metadata']['version']}"


def counted(requirements: Iterable[str]) -> Footprint:
    """Install packages, and nothing that they need, into a folder of their own, and count."""
    each = list(requirements)
    with tempfile.TemporaryDirectory() as folder:
        command = [*PIP, "install", "-q", "--no-deps", "--no-compile", "--target", folder, *each]
        subprocess.run(command, check=True, capture_output=True)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return Footprint(len(each), sum(path.stat().st_size for path in files) / 1e6, len(files))


def main() -> None:
    """Count, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", metavar="package", help="all by default")
    asking(parser)
    options = parser.parse_args()
    found: dict[str, Footprint] = {}
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(f"torch=={torch.__version__}\n")  # never another one than is here
        beyond = resolved("torch", constraints)
        for name in options.packages or PACKAGES:
            try:
                whole = resolved(PACKAGES[name], constraints)
                found[name] = counted(asked for one, asked in whole.items() if one not in beyond)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                print(f"{name}: left out: {error}", flush=True)
                continue
            one = found[name]
            print(f"{name}: {one.packages} packages, {one.megabytes:.1f} MB, {one.files:,} files", flush=True)
    if options.keep:
        rows = [
            Row(f"installed beyond torch: {what}", name, round(getattr(found[OURS], key) / getattr(one, key), 3))
            for name, one in found.items()
            if name != OURS
            for key, what in (("megabytes", "size"), ("files", "files"))
        ]
        ours = found[OURS]
        rows += [Row("installed beyond torch: size", "nothing", round(ours.megabytes, 1), unit="MB")]
        rows += [Row("installed beyond torch: files", "nothing", ours.files, unit="files")]
        keep(__file__, rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
