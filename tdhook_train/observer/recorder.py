"""What a tick measured, as rows in the buffer and as scalars for loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import RunExistsError, SettingsError
from tdhook_train.keys import dotted
from tdhook_train.method import Method
from tdhook_train.observer.measure import Row
from tdhook_train.observer.sources import Source
from tdhook_train.ops.join import Measured
from tdhook_train.schedule import Times

__all__ = ["Recorder", "scalars"]


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
        self.scalars: dict[str, float] = {}  # of the last tick
        self._methods = methods
        self._loggers = list(loggers) if isinstance(loggers, (list, tuple)) else [loggers]
        self._previous: dict[str, tuple[int, TensorDictBase]] = {}  # measured on which data, and what
        for logger in self._loggers:
            if not callable(getattr(logger, "log_metrics", None)):
                raise SettingsError(
                    f"loggers={logger!r} is no logger: those of TorchRL and Lightning have log_metrics(metrics, step)"
                )

    def previous(self, name: str, source: Source) -> dict[str, TensorDictBase | None]:
        """Return each row of the tick before, on one source; none on a probe set that has been refreshed since."""
        before = {row: self._previous.get(_name(row, name)) for row in self._methods}
        same = {row: it for row, it in before.items() if it and (not source.fixed or it[0] == source.fingerprint)}
        return {row: same[row][1] if row in same else None for row in before}

    def forget(self) -> None:
        """Forget the tick before, as going back to a checkpoint needs."""
        self._previous.clear()

    def commit(self, row: Row, source_name: str, source: Source, now: Times, weights: int) -> None:
        """Commit a row."""
        name, values = _name(row.name, source_name), row.measured.tensordict()
        if name not in self.buffer and name not in self._previous:
            self._declare(name, row)
        self.buffer.append(
            name,
            values,
            step=now.step,
            frames=now.frames,
            epoch=now.epoch,
            weights=weights,
            data=source.fingerprint,
            cost=row.cost_s,
        )
        self._previous[name] = (source.fingerprint, values)
        self.scalars |= scalars(name, row.measured)

    def _declare(self, name: str, row: Row) -> None:
        methods = self._methods[row.name]
        labels = {dim: names for dim, names in row.measured.labels.items() if names}
        legend = {key: dict(codes) for method in methods for key, codes in method.legend.items()}
        settings = [method.settings() for method in methods]
        self.buffer.declare(name, dims=row.measured.dims, coords=labels, settings=settings, legend=legend)

    def log(self, step: int) -> None:
        """Tell the loggers the scalars of the last tick."""
        for logger in self._loggers if self.scalars else ():
            logger.log_metrics(dict(self.scalars), step)

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


def scalars(name: str, measured: Measured) -> dict[str, float]:
    """Return what of a row can be drawn as a line: the mean of each floating-point key, as ``name/key``.

    Keys with a value for each row of the batch are left out, NaNs are not counted, and a key of NaNs alone is left out.
    """
    means = {}
    for key, value in measured.values.items():
        if value.is_floating_point() and "batch" not in measured.dims.get(key, ()):
            mean = float(torch.nanmean(value.double()))
            if mean == mean:
                means[f"{name}/{dotted(key)}"] = mean
    return means


def _name(row: str, source: str) -> str:
    return f"{row}.{source}" if source else row
