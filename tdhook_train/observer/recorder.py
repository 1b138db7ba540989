"""What a tick measured, as rows in the buffer and as scalars for loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDictBase

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import RunExistsError, SettingsError
from tdhook_train.method import Method
from tdhook_train.observer.measure import Row
from tdhook_train.observer.scalars import scalars
from tdhook_train.observer.station import Measurement, OfData

__all__ = ["Recorder"]


class Recorder:
    """Commits one row a method and source, and tells loggers.

    Args:
        buffer: where rows are kept.
        methods: of each row.
        loggers: TorchRL's or Lightning's, or one of them.

    Raises:
        SettingsError: something that is no logger was given.
    """

    def __init__(self, buffer: ArtifactBuffer, methods: Mapping[str, Sequence[Method]], loggers: Any) -> None:
        self.buffer = buffer
        self.scalars: dict[str, float] = {}  # of the last row of each name
        self._untold: dict[int, dict[str, float]] = {}  # by step
        self._methods = methods
        self._loggers = list(loggers) if isinstance(loggers, (list, tuple)) else [loggers]
        for logger in self._loggers:
            if not callable(getattr(logger, "log_metrics", None)):
                raise SettingsError(
                    f"loggers={logger!r} is no logger: those of TorchRL and Lightning have log_metrics(metrics, step)"
                )

    def commit(self, row: Row, found: Measurement, methods: Sequence[Method] | None = None) -> str:
        """Commit a row of what was measured, and return the name that it has there.

        Args:
            row: a row.
            found: what it is a row of.
            methods: that measured it, where these are none of the observer's.
        """
        measured_by = self._methods[row.name] if methods is None else methods
        name = f"{row.name}.{found.source}" if found.source else row.name
        if name not in self.buffer:
            self._declare(name, row, measured_by)
        self.buffer.append(
            name,
            row.measured.tensordict(),
            step=found.now.step,
            frames=found.now.frames,
            epoch=found.now.epoch,
            weights=found.weights,
            data=found.data,
            cost=row.cost_s,
        )
        means = scalars(name, row.measured, networks=found.networks, shown=_shown(measured_by))
        self.scalars |= means
        self._untold.setdefault(found.now.step, {}).update(means)
        return name

    def _declare(self, name: str, row: Row, methods: Sequence[Method]) -> None:
        labels = {dim: names for dim, names in row.measured.labels.items() if names}
        written = row.measured.values  # some methods write some of their keys only where they are asked to
        legend = {key: dict(codes) for method in methods for key, codes in method.legend.items() if key in written}
        settings = [method.settings() for method in methods]
        self.buffer.declare(name, dims=row.measured.dims, coords=labels, settings=settings, legend=legend)

    def last(self, source: str, *, fixed: bool) -> OfData:
        """Return the last rows that are stored of a source.

        Args:
            source: its name.
            fixed: rows of other data than the newest one's do not count.
        """
        rows, newest, data = dict[str, tuple[TensorDictBase, int]](), -1, 0
        for row in self._methods:
            name = f"{row}.{source}" if source else row
            if name not in self.buffer or not len(self.buffer[name].steps):
                continue
            last = self.buffer[name].last()[0].clone()  # what is read may be written over
            meta = last.pop("meta")
            rows[row] = (last, int(meta["data"]) if fixed else 0)
            if int(meta["step"]) > newest:
                newest, data = int(meta["step"]), rows[row][1]
        return OfData(data, {row: last for row, (last, of) in rows.items() if of == data})

    def log(self) -> None:
        """Tell the loggers the scalars of the rows since the last time, each of the step that it is of."""
        untold, self._untold = self._untold, {}
        for step, means in untold.items():
            for logger in self._loggers if means else ():
                logger.log_metrics(dict(means), step)

    def refuse_going_back(self, step: int) -> None:
        """Refuse rows of a training that starts again beside those of the one before.

        Raises:
            RunExistsError: there are rows of this step, or of later ones.
        """
        stored = max((int(steps[-1]) for name in self.buffer if len(steps := self.buffer[name].steps)), default=-1)
        if stored >= step:
            raise RunExistsError(
                f"{self.buffer.path} holds rows up to step {stored}, but the training is at step {step}: "
                "restore the observer by load_state_dict() from the checkpoint, or start anew with overwrite=True"
            )


def _shown(methods: Sequence[Method]) -> set[str] | None:
    """Return the keys that loggers are told of a row; all, where one of its methods says nothing."""
    each = [method.shown for method in methods]
    return None if None in each else {key for keys in each for key in keys or ()}
