"""Rows reach the disk some seconds after they were written, without the training waiting for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tdhook_train.errors import DiskError

__all__ = ["Flusher"]


class Flusher:
    """Calls a function once, some seconds after the first row that it has not been called for.

    While nothing waits to be flushed, no thread lives.

    Args:
        flush: what to call, in a thread.
        every_s: how long a row may wait; 0 or less calls nothing.
    """

    def __init__(self, flush: Callable[[], None], every_s: float) -> None:
        self._flush = flush
        self._every_s = every_s
        self._timer: threading.Timer | None = None  # waits
        self._running: threading.Timer | None = None  # flushes
        self._failed: DiskError | None = None

    def touch(self) -> None:
        """Say that a row was written.

        Raises:
            DiskError: an earlier flush failed, which is said once; the row was written.
        """
        if self._timer is None and self._every_s > 0:
            self._timer = threading.Timer(self._every_s, self._run)
            self._timer.daemon = True  # a script that ends does not wait for it: the system holds the rows
            self._timer.start()
        self._say()

    def _say(self) -> None:
        if (failed := self._failed) is not None:
            self._failed = None
            raise failed

    def _run(self) -> None:
        self._running, self._timer = self._timer, None  # rows written from now on start the next one
        try:
            self._flush()
        except OSError as error:  # said by the next append, since nobody listens to a thread
            self._failed = DiskError(error.errno, f"{error.strerror}: the last rows may not outlast a power cut")
        finally:
            self._running = None

    def stop(self) -> None:
        """Let no call follow, and wait for one that is under way.

        Raises:
            DiskError: a flush failed, which nobody was told yet.
        """
        if (timer := self._timer) is not None:
            timer.cancel()
            timer.join()
            self._timer = None
        self.wait()
        self._say()

    def wait(self) -> None:
        """Wait for a call that is under way."""
        if (running := self._running) is not None:
            running.join()
