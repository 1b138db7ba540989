"""Which checkpoints there are, and which step each is of."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tdhook_train.buffer.manifest import SCHEMA
from tdhook_train.checkpoints.formats import Checkpoint, is_torchrl
from tdhook_train.errors import CheckpointError, SettingsError

__all__ = ["Listed", "Paths", "StepOf", "files", "listed"]

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
StepOf = str | Callable[[Path], int] | None

_SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".torchrl", ".tdz")
_OF_RUNS = ("initial", "probe_sets")  # folders of a run whose files are no checkpoints
_IN_NAME = re.compile(r"(?:global_?step|step|iter(?:ation)?)[=_-]?(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Listed:
    """A checkpoint, and the moment it is of."""

    path: Path
    step: int
    frames: int | None
    epoch: int | None


def files(checkpoints: Paths) -> list[Path]:
    """Return every checkpoint that a glob, a folder (searched in depth) or a list of such names, each once.

    Raises:
        CheckpointError: there is none.
    """
    several = not isinstance(checkpoints, str | os.PathLike)
    given = [os.fspath(one) for one in checkpoints] if several else [os.fspath(checkpoints)]  # type: ignore[union-attr, arg-type]
    found: dict[Path, None] = {}
    for one in given:
        path = Path(one)
        matched = [path] if path.exists() else sorted(map(Path, glob.glob(one, recursive=True)))
        matches = matched or ([path] if several else [])  # of several, one that is missing is told of by its name
        for match in matches:
            inside = match.is_dir() and not is_torchrl(match)
            found |= dict.fromkeys(_within(match) if inside else [match])
    if not found:
        raise CheckpointError(f"no checkpoint matches {', '.join(given) or 'an empty list'}; below {Path.cwd()}")
    real = {path.resolve(): path for path in reversed(found)}  # a link and its file are one
    return [path for path in found if real[path.resolve()] == path]


def _within(folder: Path) -> Iterator[Path]:
    own = _is_run(folder)
    for path in sorted(folder.iterdir()):
        if own and (path.name in _OF_RUNS or (path / SCHEMA).is_file()):
            continue
        if path.is_dir() and is_torchrl(path):
            yield path
        elif path.is_dir() and not _is_run(path):
            yield from _within(path)
        elif path.suffix in _SUFFIXES:
            yield path


def _is_run(folder: Path) -> bool:
    """Whether it is the folder of an artifact buffer, whose files are no checkpoints."""
    return any(folder.glob(f"*/{SCHEMA}"))


def listed(
    paths: Iterable[Path], step: StepOf, read: Callable[[Path], Checkpoint], failed: Callable[[Path, Exception], None]
) -> list[Listed]:
    """Put checkpoints in the order of their steps; of several with the same weights at a step, the first is kept.

    Args:
        paths: of checkpoints.
        step: a regular expression whose first group is the step in a path, or a function of the path; what the file
            says, else its name, if None.
        read: how.
        failed: told of those that cannot be read, and of those of a step that another one is of, with other weights;
            where it does not raise, they are left out.
    """
    found: dict[int, Listed] = {}
    for path in paths:
        try:
            content = read(path)
            one = Listed(path, _step(path, content, step), content.frames, content.epoch)
        except CheckpointError as error:
            failed(path, error)
            continue
        if (twin := found.setdefault(one.step, one)) is not one and not _same(content, read(twin.path)):
            said = f"{twin.path} and {path} are both of step {one.step}, with different weights; leave one out, or say "
            failed(path, CheckpointError(f"{said}by step= how to read the step from the name"))
    return [found[number] for number in sorted(found)]


def _step(path: Path, content: Checkpoint, step: StepOf) -> int:
    if callable(step):
        return int(step(path))
    if step is not None:
        return _by_pattern(path, step)
    if content.step is not None:
        return content.step
    if match := list(_IN_NAME.finditer(path.name)):
        return int(match[-1].group(1))
    numbers = re.findall(r"\d+", path.stem)
    if len(numbers) == 1:
        return int(numbers[0])
    raise CheckpointError(
        f"{path} says neither inside nor in its name of which step it is; give step= a regular expression, such as "
        r"step=r'_(\d+)\.pt', or a function of the path"
    )


def _by_pattern(path: Path, pattern: str) -> int:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SettingsError(f"step={pattern!r} is no regular expression: {error}") from error
    if not compiled.groups:
        raise SettingsError(f"step={pattern!r} needs a group around the number, such as r'step=(\\d+)'")
    match = compiled.search(path.as_posix())
    if match is None or not match.group(1).isdigit():
        raise CheckpointError(f"step={pattern!r} finds no number in {path}")
    return int(match.group(1))


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    return one.state.keys() == other.state.keys() and all(map(partial(_alike, one, other), one.state))


def _alike(one: Checkpoint, other: Checkpoint, key: str) -> bool:
    a, b = one.state[key], other.state[key]
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else True
