"""One writer a run: two would write over each other's rows."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tdhook_train.errors import RunExistsError

try:
    import fcntl
except ImportError:  # Windows: no such locks, so nothing is checked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "WriterLock"]

LOCK = "writer.lock"


class WriterLock:
    """Held while a process writes a run; ends with the process, however that ends.

    Record locks belong to a process: its forked children do not hold the run after it was killed.

    Args:
        folder: the run's folder.

    Raises:
        RunExistsError: another process writes there.
    """

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take(folder)
        except BaseException:
            self.release()
            raise

    def _take(self, folder: Path) -> None:
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
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

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.release()
