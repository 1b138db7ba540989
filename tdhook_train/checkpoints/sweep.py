"""Every checkpoint of a training, measured after the fact by the methods that measure one while it runs."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torch import nn
from tqdm import tqdm

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.checkpoints.data import Data, data_of
from tdhook_train.checkpoints.formats import Loading, Which
from tdhook_train.checkpoints.listing import Listed, Paths, StepOf, files, listed
from tdhook_train.checkpoints.pool import worked
from tdhook_train.checkpoints.work import Bench, Block, Done, Plan, content_of
from tdhook_train.errors import CheckpointError, RunExistsError, SettingsError, WorkerError, did_you_mean
from tdhook_train.method import Method
from tdhook_train.observer import ProbeSet
from tdhook_train.observer.measure import rows_of
from tdhook_train.observer.recorder import Recorder
from tdhook_train.observer.sources import Source
from tdhook_train.observer.ticks import OnError
from tdhook_train.schedule import Times

__all__ = ["sweep"]

_BLOCK = 16  # checkpoints in a row for one process: each block but the first measures one more, for what comes before
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
        checkpoints: a glob, a folder (searched in depth), or paths. Lightning's ``.ckpt``, checkpoints of TorchRL
            (folder, archive, trainer file), state dicts by ``torch.save``, safetensors.
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
        context: what every pass is made in, e.g. ``lambda: torch.autocast("cpu", torch.bfloat16)`` for what was trained
            in mixed precision.
        overwrite: replace the run that the folder holds.
        progress: show a progress bar.

    Returns:
        The buffer: the one that was given, or the new one, open for reading.

    Raises:
        CheckpointError: there is none, two are of one step, or one cannot be used.
        RunExistsError: the folder holds a run that is no sweep.
        SettingsError: nothing to measure, or on nothing.

    Example:
        >>> sweep("ckpt/*.pt", build=Net, methods={"probe": RidgeProbe(target="y")}, data=td, into="runs/after")
        ... # doctest: +SKIP
    """
    if on_error not in _ERRORS:
        raise SettingsError(f"on_error={on_error!r}{did_you_mean(on_error, _ERRORS)}")
    if not isinstance(workers, int) or workers < 1:
        raise SettingsError(f"workers={workers!r} is no number of processes")
    rows, paths, known = rows_of(methods), files(checkpoints), data_of(data)
    keys = {**known.keys, **{name: keys for name, keys in (("in_keys", in_keys), ("out_keys", out_keys)) if keys}}
    with ExitStack() as stack:
        if isinstance(into, ArtifactBuffer):
            buffer = into
        else:
            buffer = stack.enter_context(ArtifactBuffer(into, resume=_holds_run(into), overwrite=overwrite))
        log = _Log(buffer, Recorder(buffer, rows, ()), on_error)
        initial = buffer.folder("initial") / "weights.pt"
        sources = _Sources(known, buffer)
        plan = Plan(build, rows, sources.by_content, initial, seed, keys, Loading(weights, part, allow_pickle), context)
        todo = listed(paths, step, plan.loading.read, log.unusable)
        tasks = [(one, *sources.at(one)) for one in todo]
        left = log.left(todo)
        if not initial.is_file():
            _write_initial(plan, known, todo)
        bar = stack.enter_context(tqdm(total=len(todo), initial=len(todo) - len(left), disable=not progress))
        bar.set_description(f"sweeping {len(todo)} checkpoints")
        for done in worked(plan, _blocks(tasks, left, workers), workers):
            log.commit(done)
            bar.update()
    return buffer if isinstance(into, ArtifactBuffer) else ArtifactBuffer.open(into)


@dataclass
class _Log:
    """Rows and notes of a sweep in its buffer.

    Raises:
        RunExistsError: the buffer holds rows that are of no sweep.
    """

    buffer: ArtifactBuffer
    recorder: Recorder
    on_error: OnError

    def __post_init__(self) -> None:
        self._done: dict[int, str] = {note["step"]: note["content"] for note in self.buffer.events("checkpoint")}
        held = {int(number) for name in self.buffer for number in self.buffer[name].steps}
        if others := sorted(held - self._done.keys()):
            begun = {note["step"] for note in self.buffer.events("sweep")}
            if not begun:
                raise RunExistsError(
                    f"{self.buffer.path} holds rows of step {others[0]}, which no sweep made: sweep into another "
                    "folder, or pass overwrite=True"
                )
            self.buffer.truncate(after_step=min(others) - 1)  # rows of a checkpoint that was not finished
            self._done = {number: content for number, content in self._done.items() if number < min(others)}
        self.buffer.note("sweep", step=0)

    def left(self, todo: Sequence[Listed]) -> list[Listed]:
        """Return what is not done yet.

        Raises:
            RunExistsError: a checkpoint that was measured is another one now.
        """
        for one in todo:
            if one.step in self._done and content_of(one.path) != self._done[one.step]:
                raise RunExistsError(
                    f"{self.buffer.path} holds rows of step {one.step} that were measured on another checkpoint than "
                    f"{one.path} is now; sweep into another folder, or pass overwrite=True"
                )
        return [one for one in todo if one.step not in self._done]

    def unusable(self, path: Path, error: Exception) -> None:
        """Note a checkpoint that cannot be used."""
        self._failed(str(path), "checkpoint", -1, error)

    def commit(self, done: Done) -> None:
        """Commit what was measured of a checkpoint, and note that it is done."""
        for found in done.measurements:
            for row in found.rows:
                self.recorder.commit(row, found)
        if done.measurements:
            self.buffer.note("checkpoint", step=done.now.step, path=str(done.path), content=done.content)
        for failure in done.failures:
            error = failure.error or WorkerError(failure.message)
            self._failed(str(done.path), failure.row, done.now.step, error)

    def _failed(self, path: str, row: str, step: int, error: Exception) -> None:
        self.buffer.note("error", step=step, row=row, path=path, error=f"{type(error).__name__}: {error}")
        said = "" if isinstance(error, CheckpointError) else f"measuring {row!r} of {path} failed: "
        if self.on_error == "raise":
            if said:
                error.add_note(f"while {row!r} of {path} was measured")
            raise error
        if self.on_error == "warn":
            warnings.warn(f"{said}{error}", stacklevel=2)


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

    def at(self, one: Listed) -> tuple[Times, list[tuple[str, int]]]:
        """Return the moment of a checkpoint, and what it is measured on."""
        live = self._known.at(one.step)
        frames, epoch = live or (one.frames or 0, one.epoch or 0)
        ready = list(self._known.sources.ready({}, self._folder, _never))
        self.by_content |= {(name, source.fingerprint): source for name, source in ready}
        return Times(step=one.step, frames=frames, epoch=epoch), [(name, source.fingerprint) for name, source in ready]


def _never(why: str, detail: str) -> None:
    raise SettingsError(f"{detail} is {why}")


def _write_initial(plan: Plan, known: Data, todo: Sequence[Listed]) -> None:
    """Keep the weights at initialisation: the run's, else those of step 0, else as ``build`` makes them."""
    if known.initial is not None:
        shutil.copyfile(known.initial, plan.initial)
        return
    first = todo[0].path if todo and todo[0].step == 0 else None
    Bench(plan).write_initial(first)


def _blocks(
    tasks: Sequence[tuple[Listed, Times, list[tuple[str, int]]]], left: Sequence[Listed], workers: int
) -> Iterator[Block]:
    """Cut what is left into blocks that follow one another without a gap."""
    most = max(1, min(_BLOCK, -(-len(left) // (4 * workers)))) if workers > 1 else len(tasks)
    todo: list[tuple[Listed, Times, list[tuple[str, int]]]] = []
    for i, task in enumerate(tasks):
        if task[0] in left:
            todo.append(task)
        if todo and (len(todo) == most or task[0] not in left or i + 1 == len(tasks)):
            begin = i + (task[0] in left) - len(todo)
            yield Block(tasks[begin - 1] if begin else None, todo)
            todo = []


def _holds_run(into: str | os.PathLike[str]) -> bool:
    return (Path(into) / "manifest.json").is_file()
