"""The run's folder: whether it may be used, and which of its files are ours."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from tdhook_train.buffer.events import EVENTS
from tdhook_train.buffer.lock import LOCK
from tdhook_train.buffer.manifest import MANIFEST, SCHEMA, Manifest
from tdhook_train.errors import KeyMissingError, RunExistsError, SettingsError

__all__ = [
    "OWN_FILES",
    "check_free",
    "check_name",
    "check_run",
    "delete_run",
    "holds_run",
    "others",
    "signature",
    "sweep",
]

OWN_FILES = (MANIFEST, EVENTS, LOCK)
_ROWS = re.compile(r"commits|schema\.json|\d{3}\..*\.column|[0-9a-f]{16}\.\d+\..*|\..*\.tmp")
_NAME = re.compile(r"[A-Za-z0-9_\-]([A-Za-z0-9_\-.]*[A-Za-z0-9_\-])?")  # no leading or trailing dot
_TEMPORARY = f".{MANIFEST}.*.tmp"


def check_name(name: str) -> None:
    """Refuse what cannot name a sub-folder everywhere.

    Raises:
        SettingsError: the name holds other characters, or is that of a file of ours.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in OWN_FILES:
        raise SettingsError(f"{name!r} is no name: use letters, digits, '_' and '-', and '.' between them")


def holds_run(path: Path) -> bool:
    """Return whether a run was begun there, also if its manifest was lost since."""
    return (path / MANIFEST).is_file() or any(path.glob(f"*/{SCHEMA}"))


def signature(path: Path) -> tuple[int, int, int] | None:
    """Return what changes whenever the manifest is replaced, None where there is none."""
    try:
        stat = (path / MANIFEST).stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def check_free(path: Path, *, allow_run: bool) -> None:
    """Refuse a folder in which a run cannot begin.

    Raises:
        RunExistsError: it holds a run, or files of others, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise RunExistsError(f"{path} is a file, expected a folder or nothing")
    if holds_run(path):
        if not allow_run:
            raise RunExistsError(
                f"{path} already holds a run; pass resume=True to go on with it or overwrite=True to delete it"
            )
        return
    others = sorted(file.name for file in path.iterdir() if not _is_own(file)) if path.exists() else []
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise RunExistsError(f"{path} holds no run, but other files ({shown}); choose an empty or a new folder")


def _is_own(file: Path) -> bool:
    return file.name in OWN_FILES or file.match(_TEMPORARY)


def others(path: Path, manifest: Manifest) -> list[str]:
    """Return what lies in a run's folder and is none of it."""
    known = (*manifest.artifacts, *manifest.folders)
    strangers = [file for file in path.iterdir() if not _is_own(file) and file.name not in known]
    for name in manifest.artifacts:
        strangers += [file for file in path.joinpath(name).glob("*") if not _ROWS.fullmatch(file.name)]
    return sorted(str(file.relative_to(path)) for file in strangers)


def check_run(path: Path) -> None:
    """Refuse a folder that holds no run.

    Raises:
        KeyMissingError: naming what was given and the runs near by.
    """
    if holds_run(path):
        return
    what = "holds no run" if path.is_dir() else "is a file" if path.exists() else "does not exist"
    near = [run for base in (path, path.parent) for run in _runs_at(base)]
    hint = f"; there are runs in {', '.join(map(str, near[:8]))}" if near else "; there is no run near by"
    raise KeyMissingError(f"{path} {what}{hint}")


def _runs_at(base: Path) -> list[Path]:
    try:
        return sorted(sub for sub in (base, *base.iterdir()) if holds_run(sub))
    except OSError:
        return []


def delete_run(path: Path, manifest: Manifest) -> None:
    """Delete what the manifest lists, and nothing else."""
    if not os.access(path, os.W_OK):  # before anything is deleted
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    # without its manifest the rest is no run any more, whenever this is interrupted: so that goes last
    for name in manifest.artifacts:
        for file in path.joinpath(name).glob("*"):
            if _ROWS.fullmatch(file.name):
                file.unlink()
        _remove_if_empty(path / name)
    for name in manifest.folders:
        if (path / name).is_dir() and not (path / name).is_symlink():
            shutil.rmtree(path / name)
    (path / EVENTS).unlink(missing_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Delete what a killed writer left half-done: a manifest to be."""
    for file in (*path.glob(_TEMPORARY), *path.glob(f"*/.{SCHEMA}.*.tmp")):
        file.unlink()


def _remove_if_empty(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
