"""The training's side of measuring in another process: snapshots go out, measurements come in, nothing waits."""

from __future__ import annotations

import os
import pickle
import select
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection

import cloudpickle

from tdhook_train.errors import NetworkError, WorkerError
from tdhook_train.observer.measure import Rows
from tdhook_train.observer.sources import Source
from tdhook_train.observer.station import OfData
from tdhook_train.observer.subject import Subject
from tdhook_train.observer.worker import BEGUN, Due, Job, Outcome, Start

__all__ = ["Background"]

_TO_EXIT_S = 2.0


class Background:
    """A process of its own that measures snapshots, one after another.

    At most ``waiting`` snapshots wait for it; what comes when as many wait is refused. While the process starts, which
    takes seconds, nothing is refused: then the training waits.

    The process is none of multiprocessing's: it does not run the user's script again, so that the script needs no
    ``if __name__ == "__main__"``, and classes and functions of the script may be measured with.

    Args:
        subject: what is observed.
        methods: of each row.
        seed: of what methods draw.
        waiting: how many snapshots may wait.

    Raises:
        NetworkError: a network or a method cannot be sent to another process.
    """

    def __init__(self, subject: Subject, methods: Rows, seed: int, waiting: int) -> None:
        self._outbox: deque[bytes] = deque([_start(subject, methods, seed)])
        self.inbox: deque[Outcome] = deque()  # what was measured, in order
        self._waiting = waiting
        self._fixed: dict[str, int] = {}  # fingerprints of the fixed sources that the worker has
        self._back: Mapping[str, OfData] | None = None
        self._begun = 0  # 1 when the process runs, 2 when it knows what to measure
        self._due = True  # whether a message is to come
        ours, theirs = socket.socketpair()
        with theirs:
            run = f"import sys; sys.path[:] = {sys.path!r}; from tdhook_train.observer import worker; worker.main"
            command = [sys.executable, "-c", f"{run}({theirs.fileno()})"]
            # its threads of torch sleep between two products: waiting awake they would take the training's cores
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        self._connection = Connection(ours.detach())
        self._poll = select.poll()  # several times as fast as the connection's own, and asked at every step
        self._poll.register(self._connection.fileno(), select.POLLIN)
        # a training that ends without closing its observer leaves no process behind either
        self._end = weakref.finalize(self, _end, os.getpid(), self._connection, self._process)

    @property
    def busy(self) -> bool:
        """Whether there is something to exchange."""
        return self._due or bool(self._outbox) or bool(self.inbox)

    def hand_over(self, subject: Subject, due: Due, *, wait: bool) -> bool:
        """Take a snapshot, to be measured when its turn comes.

        Args:
            subject: its weights are those of now.
            due: what is to be measured.
            wait: for room, rather than refuse.

        Returns:
            Whether there was room.

        Raises:
            WorkerError: the process ended.
        """
        self._exchange(wait=False)
        while self._full and (wait or self._begun < 2):
            self._exchange(wait=True)
        if self._full:
            return False
        with subject.view.open(None):
            sources = [(name, self._unless_sent(name, source)) for name, source in due.sources]
            job = Job(replace(due, sources=sources), subject.weights(), self._back)
            message = pickle.dumps(job)
        self._outbox.append(message)  # not before it is written: what interrupts that sends nothing
        self._fixed |= {name: source.fingerprint for name, source in due.sources if source and source.fixed}
        self._back = None
        self._exchange(wait=False)
        return True

    @property
    def _full(self) -> bool:
        return len(self._outbox) >= self._waiting + (self._begun < 1)  # the start is among them

    def _unless_sent(self, name: str, source: Source | None) -> Source | None:
        if source is None or not source.fixed:
            return source
        if self._fixed.get(name) == source.fingerprint:
            return None
        return source

    def collect(self, *, wait: bool = False) -> None:
        """Bring what was measured by now to the :attr:`inbox`.

        Args:
            wait: for everything that was handed over.

        Raises:
            WorkerError: the process ended.
        """
        self._exchange(wait=False)
        while wait and (self._outbox or (self._due and self._begun == 2)):
            self._exchange(wait=True)

    def go_back(self, last: Mapping[str, OfData]) -> None:
        """Forget the ticks before, but for these rows, by source: as going back to a checkpoint needs."""
        self._back = last

    def close(self) -> None:
        """End the process, whatever it does. Safe to call twice."""
        self._end()

    def _exchange(self, *, wait: bool) -> None:
        """Take the message that is due, if it is there or waited for, and then send what is next."""
        if self._due and not self._poll.poll(None if wait else 0):
            return
        try:
            if self._due:
                message = self._connection.recv_bytes()
                self._due = False
                if message == BEGUN:
                    self._begun += 1
                else:
                    self.inbox.append(pickle.loads(message))
            if self._outbox:
                self._connection.send_bytes(self._outbox.popleft())
                self._due = True
        except BaseException as error:  # Ctrl-C as well: half a message would make nonsense of all after it
            self._outbox.clear()
            self._due = False
            if not isinstance(error, OSError | EOFError):
                self.close()
                raise
            with suppress(subprocess.TimeoutExpired):  # it closed its end, and says next why
                self._process.wait(_TO_EXIT_S)
            self.close()
            raise WorkerError(
                f"the process that measures in the background ended with exit code {self._process.returncode}; what it "
                "said stands above. With background=False the training measures itself"
            ) from error


def _start(subject: Subject, methods: Rows, seed: int) -> bytes:
    try:
        return cloudpickle.dumps(Start(subject, methods, seed))
    except NetworkError:
        raise
    except Exception as error:  # whatever pickling somebody's network raises
        raise NetworkError(
            f"background=True sends networks and methods to another process, but these cannot be sent: {error}"
        ) from error


def _end(owner: int, connection: Connection, process: subprocess.Popen[bytes]) -> None:
    connection.close()
    if os.getpid() == owner:  # not where a fork of the training ends
        process.kill()
        process.wait()
