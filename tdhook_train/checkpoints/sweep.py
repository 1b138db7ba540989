"""Every checkpoint of a training, measured after the fact by the methods that measure one while it runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torch import nn
from tqdm import tqdm

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.buffer.manifest import MANIFEST
from tdhook_train.checkpoints.data import Data, data_of
from tdhook_train.checkpoints.formats import Loading, Which
from tdhook_train.checkpoints.listing import Listed, Paths, StepOf, files, listed
from tdhook_train.checkpoints.log import Log
from tdhook_train.checkpoints.pool import worked
from tdhook_train.checkpoints.work import Bench, Block, Plan, Task, content_of
from tdhook_train.errors import CheckpointError, SettingsError, did_you_mean
from tdhook_train.method import Method
from tdhook_train.observer import ProbeSet
from tdhook_train.observer.measure import rows_of
from tdhook_train.observer.sources import Source
from tdhook_train.observer.subject import keys_beside
from tdhook_train.observer.ticks import OnError
from tdhook_train.schedule import Times

__all__ = ["sweep"]

_BLOCK = 16  # checkpoints in a row for one process: each block but the first measures one more, for what comes before
_SHORT = 4  # where no row goes by the one before
_ERRORS = ("raise", "warn", "skip")


def sweep(  # noqa: PLR0913 - the one place where a user says everything
    checkpoints: Paths,
    build: Callable[[], nn.Module],
    methods: Mapping[str, Method | Sequence[Method]],
    data: TensorDictBase | ProbeSet | Mapping[str, Any] | ArtifactBuffer | str | os.PathLike[str],
    into: ArtifactBuffer | str | os.PathLike[str],
    *,
    workers: int = 1,
    step: StepOf = None,
    weights: Which = "live",
    part: str | None = None,
    in_keys: list[Any] | Mapping[Any, str] | None = None,
    out_keys: list[Any] | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
    allow_pickle: bool = False,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    overwrite: bool = False,
    progress: bool = True,
) -> ArtifactBuffer:
    """Measure every checkpoint, and commit one row a method and checkpoint.

    A row of a checkpoint is the row that the run recorded at that step, where methods, data and seed are the same: give
    ``data`` the run's folder. A sweep that was interrupted goes on: checkpoints that are done are known by their
    content, and left out.

    Args:
        checkpoints: a glob, a folder (searched in depth), or a list of such. Lightning's ``.ckpt``, checkpoints of
            TorchRL (folder, archive, trainer file), state dicts by ``torch.save``, safetensors.
        build: makes the model, or the TorchRL loss that holds it; called once a process, under ``seed``.
        methods: what to measure, as an :class:`~tdhook_train.Observer` takes it.
        data: what to measure on: a TensorDict, a :class:`~tdhook_train.ProbeSet`, several by name; or the folder of a
            run, whose probe sets are taken as they were at each step, with its weights at initialisation.
        into: an :class:`~tdhook_train.ArtifactBuffer`, or the folder to make one in.
        workers: processes; one measures here. Each holds one model. Give torch one thread
            (``torch.set_num_threads(1)``) where there are as many as cores. They need no ``if __name__ == "__main__"``.
        step: how to read the step: a regular expression whose first group is the number in the path, or a function of
            the path; what the file says, else its name, by default.
        weights: the trained ones, or the running average that Lightning's ``WeightAveraging`` keeps.
        part: which entry of a checkpoint holds the weights, where that is not clear.
        in_keys: of a plain module: see :class:`~tdhook_train.HookedModel`; those of the run, if None.
        out_keys: likewise.
        seed: of what methods draw.
        on_error: a checkpoint that cannot be used (cut short, keys missing, other shapes) or a method that fails stops
            the sweep, warns, or is only noted in the run's events.
        allow_pickle: let checkpoints run whatever they ask for; without, only weights are read.
        context: what every pass is made in: for what Lightning trained in another precision than ``"32-true"``, that of
            such a trainer, ``Trainer(precision="bf16-mixed").precision_plugin.forward_context``; or a function like
            ``lambda: torch.autocast("cpu", torch.bfloat16)``.
        overwrite: replace the run that the folder holds.
        progress: show a progress bar.

    Returns:
        The buffer: the one that was given, or the new one, open for reading.

    Raises:
        CheckpointError: there is none, two are of one step, or one cannot be used.
        RunExistsError: the folder holds a run that is no sweep.
        SettingsError: nothing to measure, or on nothing.

    Example:
        >>> from tdhook_train.latent import RidgeProbe
        >>> probe = RidgeProbe(target="y")
        >>> buffer = sweep("ckpt/*.pt", build=Net, methods={"probe": probe}, data=td, into="runs/after", progress=False)
        >>> buffer["probe"].steps
        tensor([0, 1])
    """
    if on_error not in _ERRORS:
        raise SettingsError(f"on_error={on_error!r}{did_you_mean(on_error, _ERRORS)}")
    if not isinstance(workers, int) or workers < 1:
        raise SettingsError(f"workers={workers!r} is no number of processes")
    rows, paths, known = rows_of(methods), files(checkpoints), data_of(data)
    keys = {**known.keys, **{name: keys for name, keys in (("in_keys", in_keys), ("out_keys", out_keys)) if keys}}
    drawn = {"seed": seed, "weights": weights, "part": part}
    with ExitStack() as stack:
        if isinstance(into, ArtifactBuffer):
            buffer = into
        else:
            buffer = stack.enter_context(
                ArtifactBuffer(into, resume=_holds_run(into) and not overwrite, overwrite=overwrite)
            )
        log = Log(buffer, rows, known.sources.names, drawn, on_error)
        initial = buffer.folder("initial") / "weights.pt"
        sources = _Sources(known, buffer)
        plan = Plan(build, rows, sources.by_content, initial, seed, keys, Loading(weights, part, allow_pickle), context)
        tasks = [sources.task(one) for one in listed(paths, step, plan.loading.read, log.unusable)]
        whole = _Sweep(plan, tasks, log, workers)
        if not initial.is_file():
            _keep_initial(whole, known)
        _measure(whole, progress=progress)
    return buffer if isinstance(into, ArtifactBuffer) else ArtifactBuffer.open(into)


@dataclass(frozen=True)
class _Sweep:
    """What is measured, by how many processes, and where that is kept."""

    plan: Plan
    tasks: Sequence[Task]
    log: Log
    workers: int

    @cached_property
    def bench(self) -> Bench:
        """The model of this process."""
        return Bench(self.plan)

    def due(self) -> dict[int, frozenset[str]]:
        """Return the rows that are due, by step."""
        read = self.plan.loading.read
        due = {
            task.now.step: self.log.due(task.checkpoint, lambda path: content_of(read(path).state))
            for task in self.tasks
        }
        return {step: rows for step, rows in due.items() if rows}

    def stale(self) -> dict[int, frozenset[str]]:
        """Return the rows of checkpoints before which others came since: they may compare with those."""
        rows = self._looking_back(self.plan.methods)
        return {task.now.step: rows for task in self.tasks if rows and self.log.stale(task.now.step)}

    def blocks(self, due: Mapping[int, frozenset[str]]) -> Iterator[Block]:
        """Cut what is due into blocks of checkpoints that follow one another, of which the same rows are due."""
        tasks, workers, begin = self.tasks, self.workers, 0
        longest = _BLOCK if self._looking_back(self.plan.methods) else _SHORT
        most = max(1, min(longest, -(-len(due) // (4 * workers)))) if workers > 1 else len(tasks)
        while begin < len(tasks):
            rows, end = due.get(tasks[begin].now.step), begin + 1
            while rows and end < len(tasks) and end - begin < most and due.get(tasks[end].now.step) == rows:
                end += 1
            if rows:
                yield self._block(begin, end, rows)
            begin = end

    def _block(self, begin: int, end: int, rows: frozenset[str]) -> Block:
        tasks = self.tasks
        if not self._looking_back(rows):
            return Block(tasks[begin:end], rows)
        known = next((i for i in range(begin, 0, -1) if self.log.has(tasks[i - 1].now.step, rows)), 0)
        first = tasks[min(known, begin)].now.step
        return Block(tasks[begin:end], rows, tasks[known:begin][::-1], self.log.last(first, rows), looks_back=True)

    def _looking_back(self, rows: Iterable[str]) -> frozenset[str]:
        """Return those whose methods may go by the row before."""
        return frozenset(row for row in rows if any(method.looks_back for method in self.plan.methods[row]))


def _measure(sweep: _Sweep, *, progress: bool) -> None:
    with tqdm(total=len(sweep.tasks), disable=not progress) as bar:
        bar.set_description(f"sweeping {bar.total} checkpoints")
        due = sweep.due()
        bar.update(bar.total - len(due))
        _commit(sweep, due, bar)
        due = sweep.stale()
        bar.total += len(due)
        _commit(sweep, due, bar)


def _commit(sweep: _Sweep, due: Mapping[int, frozenset[str]], bar: Any) -> None:
    if due:
        with closing(worked(sweep.plan, sweep.blocks(due), sweep.workers, sweep.bench)) as every:
            for done in every:
                sweep.log.commit(done)
                bar.update()


class _Sources:
    """What each checkpoint is measured on, by name and content hash.

    Args:
        known: what was given.
        buffer: where probe sets are kept, as of any run.
    """

    def __init__(self, known: Data, buffer: ArtifactBuffer) -> None:
        self.by_content: dict[tuple[str, int], Source] = {}
        self._known = known
        self._folder = buffer.folder("probe_sets")
        known.sources.agree_with(buffer)

    def task(self, one: Listed) -> Task:
        """Return the moment of a checkpoint, and what it is measured on."""
        live = self._known.at(one.step)
        frames, epoch = live or (one.frames or 0, one.epoch or 0)
        ready = list(self._known.sources.ready({}, self._folder, _never))
        self.by_content |= {(name, source.fingerprint): source for name, source in ready}
        now = Times(step=one.step, frames=frames, epoch=epoch)
        return Task(one, now, [(name, source.fingerprint) for name, source in ready])


def _never(why: str, detail: str) -> None:
    raise SettingsError(f"{detail} is {why}")


def _keep_initial(sweep: _Sweep, known: Data) -> None:
    """Keep the weights at initialisation: the run's, else those of step 0, else as ``build`` makes them."""
    tasks = sweep.tasks
    if known.initial is not None:
        for stored in (known.initial, keys_beside(known.initial)):
            if stored.is_file():
                shutil.copyfile(stored, sweep.plan.initial.with_name(stored.name))
        return
    try:
        sweep.bench.write_initial(tasks[0].checkpoint.path if tasks and tasks[0].now.step == 0 else None)
    except CheckpointError as error:
        sweep.log.unusable(tasks[0].checkpoint.path, error)
        sweep.bench.write_initial(None)


def _holds_run(into: str | os.PathLike[str]) -> bool:
    return (Path(into) / MANIFEST).is_file()
