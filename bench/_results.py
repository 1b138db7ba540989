"""What the scripts measured, kept in ``results/<script>.json``, from which ``bench/README.md`` has its table."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

__all__ = ["RESULTS", "Row", "asking", "keep", "kept"]

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One number.

    Args:
        what: was measured.
        against: what it is compared with.
        value: the ratio, or a number with a unit of its own.
        asked: what was asked for, if anything.
        better: whether less or more is better; of ratios, ours over theirs is ``"less"``, theirs over ours ``"more"``.
        unit: of the value.
        where: machine, versions and day.
    """

    what: str
    against: str
    value: float
    asked: float | None = None
    better: Literal["less", "more"] = "less"
    unit: str = "×"
    where: str = ""

    @property
    def missed(self) -> bool:
        """Whether it is not what was asked for."""
        if self.asked is None:
            return False
        return not (self.value <= self.asked if self.better == "less" else self.value >= self.asked)


def asking(parser: argparse.ArgumentParser) -> None:
    """Give a script the option to keep what it measures."""
    parser.add_argument("--keep", action="store_true", help="write it to bench/results, for `make bench-table`")


def kept(script: str) -> list[Row]:
    """Return what was kept of a script, nothing if it never ran."""
    path = RESULTS / f"{script}.json"
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def keep(file: str, rows: Sequence[Row], *, threads: int, peers: Sequence[str] = ()) -> None:
    """Keep the rows of a script; those of peers that are missing here stay as they were.

    Args:
        file: the script, its ``__file__``.
        rows: what it measured.
        threads: of torch.
        peers: distributions that it compares with, whose versions count.
    """
    script, here = Path(file).stem, where(threads, peers)
    new = {(row.what, row.against): replace(row, where=here) for row in rows}
    old = {(row.what, row.against): row for row in kept(script)}
    stayed = [row for key, row in old.items() if key not in new]
    found = [new.pop(key, row) for key, row in old.items()] + list(new.values())
    write(script, found)
    print(f"\nkept in results/{script}.json" + (f"; of an earlier run: {len(stayed)}" if stayed else ""))


def write(script: str, rows: Sequence[Row]) -> None:
    """Write rows in a form that shows what changed from one run to the next."""
    RESULTS.mkdir(exist_ok=True)
    rounded = [replace(row, value=float(f"{row.value:.4g}")) for row in rows]
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rounded)
    (RESULTS / f"{script}.json").write_text(f"[\n{lines}\n]\n")


def where(threads: int, peers: Sequence[str] = ()) -> str:
    """Describe this machine and what is installed."""
    installed = [f"{name} {found}" for name in ("torch", "tensordict", "torchrl", *peers) if (found := _version(name))]
    threaded = f"{threads} thread{'s' if threads > 1 else ''}"
    return (
        f"{os.cpu_count()} cores of an {processor()}, {threaded} of torch; Python {platform.python_version()}, "
        f"{', '.join(installed)}; {date.today()}"
    )


def processor() -> str:
    """Return what the system calls the processor."""
    told = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    rows = dict(line.split(":", 1) for line in told if ":" in line)
    return next((value.strip() for name, value in rows.items() if name.strip() == "model name"), platform.machine())


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
