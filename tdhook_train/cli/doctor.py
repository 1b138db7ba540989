"""``tdhook-train doctor``: what is installed here, and whether it will do."""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from tdhook_train.cli.printing import Table, say, size

__all__ = ["EXAMPLES", "EXTRAS", "doctor"]

EXAMPLES = (
    "tdhook-train doctor",
    "tdhook-train doctor /scratch/runs                  does that disk take runs?",
)
CORE = ("tdhook-train", "torch", "tensordict", "torchrl", "numpy", "scipy")
EXTRAS = {
    "mujoco": ("gymnasium", "mujoco"),
    "lightning": ("lightning",),
    "plots": ("plotly", "matplotlib", "pandas"),
    "tables": ("pandas", "xarray", "pyarrow"),
    "probes": ("scikit-learn",),
}
_PROBE_BYTES = 1 << 16


def doctor(
    folder: Annotated[Path, typer.Argument(help="Where runs are to lie.", show_default="the working directory")] = Path(
        "."
    ),
) -> None:
    """Say what is installed, and whether a disk takes runs.

    Ends with 1 where something is missing without which nothing works.
    """
    versions = {name: _version(name) for name in CORE}
    rows = [["python", platform.python_version()], *([name, found or "missing"] for name, found in versions.items())]
    say(f"{platform.system()} {platform.release()}, {platform.machine()}")
    Table(["package", "version"], rows, text=("package", "version")).print()
    say()
    for line in _devices():
        say(line)
    say()
    Table(
        ["extra", "installed", "missing"], [_extra(name) for name in EXTRAS], text=("extra", "installed", "missing")
    ).print()
    say()
    trouble = _disk(folder)
    say(f"disk: {folder.resolve()} {trouble or f'takes memory maps, {size(_free(folder))} free'}")
    core = [name for name, found in versions.items() if found is None and name != "tdhook-train"]  # or a checkout
    if trouble or core:
        raise typer.Exit(1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    yield f"cores: {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}"
    if _version("torch") is None:
        return
    import torch

    yield f"threads of torch: {torch.get_num_threads()}"
    if not torch.cuda.is_available():
        yield "devices: cpu" + (", mps" if torch.backends.mps.is_available() else "")
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield f"device cuda:{i}: {about.name}, {size(about.total_memory)}"


def _extra(name: str) -> list[str]:
    found = {package: _version(package) for package in EXTRAS[name]}
    there = ", ".join(f"{package} {number}" for package, number in found.items() if number)
    missing = ", ".join(package for package, number in found.items() if number is None)
    return [name, there, f'{missing}: pip install "tdhook-train[{name}]"' if missing else "nothing"]


def _disk(folder: Path) -> str:
    """Return why runs cannot lie in a folder, nothing where they can."""
    if not folder.is_dir():
        return "is no folder"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, _PROBE_BYTES)
            else:
                file.truncate(_PROBE_BYTES)
            with mmap.mmap(file.fileno(), _PROBE_BYTES) as mapped:
                mapped[-4:] = b"here"
                mapped.flush()
            file.seek(-4, os.SEEK_END)
            return "" if file.read() == b"here" else "loses what is written by memory maps"
    except (OSError, ValueError) as error:
        return f"takes no memory maps: {error}"


def _free(folder: Path) -> int:
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize
