"""A run's folder of artifacts: every row that was acknowledged is there when it is opened again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal
from weakref import WeakValueDictionary

from tdhook_train.buffer import events, folder
from tdhook_train.buffer.flusher import Flusher
from tdhook_train.buffer.lock import WriterLock
from tdhook_train.buffer.manifest import SCHEMA, write_schema
from tdhook_train.buffer.merging import appearing, copy_rows, labelled, labels_of
from tdhook_train.buffer.recording import Recording
from tdhook_train.buffer.retention import Keep, Retention
from tdhook_train.buffer.rows import Damaged
from tdhook_train.errors import SettingsError

__all__ = ["ArtifactBuffer"]

FLUSH_EVERY_S = 30.0

_WRITERS: WeakValueDictionary[str, ArtifactBuffer] = WeakValueDictionary()


class ArtifactBuffer(Recording):
    """The artifacts of a run, each a replay buffer in a sub-folder of its own.

    Rows outlast the process as soon as ``append`` returns, and a power cut after :meth:`flush`, which a thread calls
    some seconds after each row. Without limits nothing is ever dropped; those given here hold for each artifact that
    :meth:`declare` gives no others, also when the run is resumed.

    Args:
        path: the run's folder; made where there is none.
        resume: go on with the run that the folder holds, if it holds one.
        overwrite: delete the run that the folder holds, if it holds one; files of others stay.
        seed: of the generators that samplers draw from.
        capacity: how many rows each artifact may hold; None sets no limit.
        max_bytes: how many bytes each artifact may take up on the disk; None sets no limit.
        keep: which rows stay where there are too many: the ``"newest"``; ``"log-spaced"`` in steps; ``("largest",
            key)`` or ``("smallest", key)``, by the value of a key that holds one number.
        flush_every: how many seconds a row may wait for the disk; 0 leaves it to :meth:`flush` and the system.

    Raises:
        RunExistsError: the folder holds a run and neither option was given, or it holds other files.
        SettingsError: both options were given.

    Example:
        >>> with ArtifactBuffer("runs/a", capacity=500, keep="log-spaced") as buffer:
        ...     row = buffer.append("loss", {"policy": 0.3, "value": torch.tensor([1.0, 2.0])}, step=7)
        >>> ArtifactBuffer.open("runs/a")["loss"].series("value")
        tensor([[1., 2.]])
    """

    def __init__(  # noqa: PLR0913 - how a folder is opened, and what is kept there
        self,
        path: str | os.PathLike[str],
        *,
        resume: bool = False,
        overwrite: bool = False,
        seed: int = 0,
        capacity: int | None = None,
        max_bytes: int | None = None,
        keep: Keep | None = None,
        flush_every: float = FLUSH_EVERY_S,
    ) -> None:
        if resume and overwrite:
            raise SettingsError("resume=True and overwrite=True were given; choose one")
        self._begin(Path(path), "a", seed)
        limits = Retention().changed(capacity, max_bytes, keep)
        folder.check_free(self.path, allow_run=resume or overwrite)
        self._flusher = Flusher(self.flush, flush_every)
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_over(overwrite, None if limits == Retention() else limits)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["r", "a"] = "r",
        *,
        seed: int = 0,
        damaged: Damaged = "raise",
    ) -> ArtifactBuffer:
        """Open a run that is there, to read it (also while another process writes) or to go on writing.

        Args:
            path: the run's folder.
            mode: ``"r"`` reads, also from a read-only file system; ``"a"`` goes on writing.
            seed: of the generators that samplers draw from.
            damaged: ``"raise"`` where something damaged is read, or ``"skip"``: everything is compared with its
                checksum when an artifact is first asked for, and damaged rows are left out with a warning.

        Raises:
            KeyMissingError: there is no run; the message names the runs near by.
        """
        if mode not in ("r", "a"):
            raise SettingsError(f"mode={mode!r} is neither 'r' nor 'a'")
        if damaged not in ("raise", "skip"):
            raise SettingsError(f"damaged={damaged!r} is neither 'raise' nor 'skip'")
        folder.check_run(Path(path))
        buffer = cls.__new__(cls)
        buffer._begin(Path(path), mode, seed, damaged)
        buffer._flusher = Flusher(buffer.flush, FLUSH_EVERY_S)
        if mode == "a":
            buffer._take_over()
        else:
            buffer._seen = folder.signature(buffer.path)
            buffer._manifest = buffer._find_manifest()
        return buffer

    @classmethod
    def merge(
        cls,
        runs: Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]],
        into: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: bool = True,
    ) -> ArtifactBuffer:
        """Copy the rows of several runs into a new one, each with the label of its run, and open it for reading.

        For seeds, for ranks, for sweeps done in pieces; with a single run, to copy what is whole of a damaged one.
        ``where(("meta", "run"), label)`` gives the rows of one run; tables have a column ``run``. Of runs that were
        merged themselves the labels are ``"outer/inner"``. Other folders of the runs stay where they are.

        Args:
            runs: folders by label; without labels, the names of the folders.
            into: the new folder, which appears when it is complete.
            overwrite: delete the run that this folder holds.
            progress: whether to show a progress bar.

        Raises:
            SchemaError: an artifact differs between the runs; the message names the run and what differs.
            SettingsError: two runs have the same label, or there is none.
        """
        sources = {label: cls.open(path, damaged="skip") for label, path in labelled(runs).items()}
        with appearing(Path(into).resolve(), overwrite=overwrite) as folder_, cls(folder_) as merged:
            merged._write_manifest(replace(merged._manifest, runs=labels_of(sources)))
            copy_rows(sources, merged, progress=progress)
        return cls.open(into)

    def _take_over(self, overwrite: bool = False, limits: Retention | None = None) -> None:
        where = str(self.path.resolve())
        if (before := _WRITERS.get(where)) is not None:
            before.close()  # of one process, the writer opened last goes on, as in a notebook cell that is run again
        self._lock = WriterLock(self.path)
        try:
            self._start(overwrite, limits)
        except BaseException:
            self._lock.release()
            raise
        _WRITERS[where] = self

    def _start(self, overwrite: bool, limits: Retention | None) -> None:
        found = self._find_manifest() if folder.holds_run(self.path) else None
        if found is not None and overwrite:
            folder.delete_run(self.path, found)
            found = None
        if found is not None:
            self._manifest = replace(found, attempt=found.attempt + 1)
            folder.sweep(self.path)
        if limits is not None:
            self._manifest = replace(self._manifest, retention=limits)
        self._manifest.write(self.path)
        for name, entry in self._manifest.artifacts.items():
            if not (self.path / name / SCHEMA).exists():
                write_schema(self.path / name, entry)
        events.mend(self.path)

    # --- the end

    def close(self) -> None:
        """Flush, and let others write; rows can still be read. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._flusher.stop()
            if os.getpid() == self._process:
                self.flush()
        finally:
            for artifact in self._artifacts.values():
                artifact.storage.writable = False
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> ArtifactBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
