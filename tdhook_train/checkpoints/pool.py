"""Blocks of checkpoints, measured here or by several processes; what became of them comes in their order."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import pickle
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Executor, Future
from itertools import islice
from pathlib import Path
from typing import Any

import cloudpickle

from tdhook_train.checkpoints.work import Bench, Block, Done, Plan
from tdhook_train.errors import SettingsError, WorkerError

__all__ = ["worked"]

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_AHEAD = 8  # blocks that may be done before one that comes before them, for each process

_sent = Path()  # where the plan lies, in a process that is one of several
_bench: Bench | None = None  # likewise, once it has begun


def worked(plan: Plan, blocks: Iterable[Block], workers: int, bench: Bench) -> Generator[Done]:
    """Measure blocks of checkpoints.

    Args:
        plan: what is the same for all of them.
        blocks: in order.
        workers: processes, this one among them.
        bench: of this process.

    Raises:
        SettingsError: the plan cannot be sent to another process.
        WorkerError: a process ended.
    """
    if workers == 1:
        for block in blocks:
            yield from bench.measure(block)
        return
    import loky  # sends functions of the script along, and does not run it again

    try:
        sent = cloudpickle.dumps(plan)
    except Exception as error:  # whatever pickling somebody's function raises
        raise SettingsError(f"workers={workers} sends build, methods and data to processes: {error}") from error
    environment: dict[str, Any] = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads of torch that wait awake take others' cores
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan"  # through a pipe, this process would wait for the others to start
        file.write_bytes(sent)
        pool = loky.ProcessPoolExecutor(workers - 1, initializer=_begin, initargs=(file, os.getcwd()), env=environment)
        try:
            yield from _shared(pool, blocks, workers - 1, bench)
            pool.shutdown(wait=True)  # at their own pace, since they may hold semaphores
        except loky.process_executor.BrokenProcessPool as error:
            raise WorkerError(
                f"a process that measures checkpoints ended; what it said stands above. {error}"
            ) from error
        finally:
            pool.shutdown(wait=True, kill_workers=True)


def _shared(pool: Executor, blocks: Iterable[Block], others: int, bench: Bench) -> Generator[Done]:
    """Measure here as well as in the other processes, which take seconds to start."""
    under_way: deque[Future[list[bytes]] | list[Done]] = deque()
    remaining = iter(blocks)
    while True:
        if len(under_way) < _AHEAD * (others + 1) and (mine := next(remaining, None)):
            waiting = sum(isinstance(one, Future) and not one.done() for one in under_way)
            under_way.append(here := list[Done]())
            under_way.extend(pool.submit(_measure, block) for block in islice(remaining, 2 * others - waiting))
            here.extend(bench.measure(mine))
        elif not under_way:
            return
        else:
            yield from _found(under_way.popleft())
        while under_way and (isinstance(under_way[0], list) or under_way[0].done()):
            yield from _found(under_way.popleft())


def _found(block: Future[list[bytes]] | list[Done]) -> Iterable[Done]:
    return block if isinstance(block, list) else map(pickle.loads, block.result())


def _begin(plan: Path, folder: str) -> None:
    global _sent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C means the sweep, which ends this process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a sweep that is killed leaves no process behind
    atexit.register(_end)
    os.chdir(folder)
    _sent = plan  # what fails while it is unpacked is said as the error of a block, not as the end of a process


def _end() -> None:
    """End at once: what had to be cleared up is, and Python would take a second to forget torch."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _measure(block: Block) -> list[bytes]:
    global _bench
    if _bench is None:
        _bench = Bench(cloudpickle.loads(_sent.read_bytes()))
        gc.collect()  # what build() made beside the model, such as replay buffers and their semaphores
    return [done.written() for done in _bench.measure(block)]
