"""One writer a run: two would write over each other's rows."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import NoReturn
from weakref import WeakSet

from tdhook_train.errors import RunExistsError

try:
    import fcntl
except ImportError:  # Windows: no such locks, so nothing is checked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "WriterLock", "lives", "writer_of"]

LOCK = "writer.lock"
_HELD: WeakSet[WriterLock] = WeakSet()


def _let_go() -> None:
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class WriterLock:
    """Held while a process writes a run; ends with the process, however that ends.

    It belongs to the open file: copying the folder does not end it, as it would with record locks. Forked children let
    go of it, so that they do not hold the run after the writer was killed.

    Args:
        folder: the run's folder.

    Raises:
        RunExistsError: another process writes there.
    """

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        _HELD.add(self)
        try:
            self._take(folder)
        except BaseException:
            self.release()
            raise

    def _take(self, folder: Path) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system without locks
            owner = os.read(self._fd, 32).decode().strip()
            raise RunExistsError(
                f"{folder} is being written by process {owner}; close it there, or read with ArtifactBuffer.open(path)"
            ) from None
        os.truncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Let others write; safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a lock is not copied: a run has one writer")

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.release()


def writer_of(folder: Path) -> int | None:
    """Return the process of this machine that writes a run, None if there is none; takes no lock to find out."""
    try:
        with (folder / LOCK).open("rb") as file:
            lock, text = os.fstat(file.fileno()), file.read(32).decode().strip()
    except OSError:
        return None
    if not text.isdecimal() or not lives(int(text)):
        return None
    return int(text) if _has_open(int(text), lock) else None


def lives(process: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _has_open(process: int, file: os.stat_result) -> bool:
    """Whether a process has a file open, as far as the system tells; the writer of a run has its lock open."""
    try:
        descriptors = list(Path(f"/proc/{process}/fd").iterdir())
    except OSError:  # another user's process, or a system without /proc
        return True
    for descriptor in descriptors:
        with suppress(OSError):  # closed meanwhile
            if os.path.samestat(descriptor.stat(), file):
                return True
    return False
