"""One class per cause of failure; every message says what was given, where, and the nearest right value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ClosedError",
    "DamagedError",
    "DamagedWarning",
    "DiskError",
    "EnvironmentNameError",
    "GroupsError",
    "KeyMissingError",
    "MissingPackageError",
    "NetworkError",
    "PathError",
    "ResolveError",
    "RunExistsError",
    "SchemaError",
    "SetterError",
    "SettingsError",
    "TargetError",
    "TdhookTrainError",
    "UserCodeError",
    "WorkerError",
    "did_you_mean",
]


class TdhookTrainError(Exception):
    """Base of every error this library raises on purpose."""


class PathError(TdhookTrainError, LookupError):
    """A path or pattern names no module of the model."""


class ResolveError(TdhookTrainError, RuntimeError):
    """A proxy was resolved before its value exists, or the value never came to be."""


class SetterError(TdhookTrainError, RuntimeError):
    """A setting would have been ignored or would have broken the model."""


class SettingsError(TdhookTrainError, ValueError):
    """A setting of a method, trigger or observer is out of its range."""


class TargetError(TdhookTrainError, LookupError):
    """A target names no output of the network, or is no number to differentiate."""


class KeyMissingError(TdhookTrainError, LookupError):
    """A key is absent from the batch or the buffer."""


class GroupsError(TdhookTrainError, ValueError):
    """The rows of a probe set cannot be told apart by trajectory."""


class NetworkError(TdhookTrainError, TypeError):
    """No network to observe was found where one was expected."""


class BudgetError(TdhookTrainError, ValueError):
    """A budget that no schedule can keep."""


class SchemaError(TdhookTrainError, ValueError):
    """A row, or a folder, does not have the shape that was declared."""


class RunExistsError(TdhookTrainError, FileExistsError):
    """The folder already holds a run; nothing was overwritten."""


class ClosedError(TdhookTrainError, RuntimeError):
    """Something was asked of a buffer or observer that is closed."""


class CheckpointError(TdhookTrainError, ValueError):
    """A checkpoint cannot be read, or is none of the model that was built."""


class WorkerError(TdhookTrainError, RuntimeError):
    """The process that measures in the background failed."""


class UserCodeError(TdhookTrainError, RuntimeError):
    """Somebody's own function, named on the command line, raised something."""


class DamagedError(TdhookTrainError, ValueError):
    """What is stored is not what was written: a file was cut, lost or changed."""


class DamagedWarning(UserWarning):
    """Something stored is damaged and was left out; the rest can be read."""


class DiskError(TdhookTrainError, OSError):
    """The file system took no more; what was stored before is whole."""


class EnvironmentNameError(TdhookTrainError, ValueError):
    """No environment of that id is registered with gymnasium."""


class MissingPackageError(TdhookTrainError, ImportError):
    """An optional package is not installed; the message holds the install line."""


def did_you_mean(given: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return ``"; did you mean 'x'?"`` for the known names nearest to ``given``, or a list of what there is."""
    names = [str(name) for name in known if str(name)]
    near = difflib.get_close_matches(given, names, n=limit, cutoff=0.5)
    if not near:  # the last segment alone is what people misspell in a long path
        tails = {name.rsplit(".", 1)[-1]: name for name in names}
        near = [tails[tail] for tail in difflib.get_close_matches(given.rsplit(".", 1)[-1], tails, n=limit, cutoff=0.6)]
    if near:
        return f"; did you mean {' or '.join(repr(name) for name in near)}?"
    shown = ", ".join(repr(name) for name in names[:12]) + (", …" if len(names) > 12 else "")
    return f"; there is {shown}" if shown else "; there is none"
