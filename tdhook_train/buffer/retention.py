"""Which rows go when an artifact may hold no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tdhook_train.buffer.row import Key, as_key, key_name, show
from tdhook_train.errors import SchemaError, SettingsError, did_you_mean

if TYPE_CHECKING:
    from tdhook_train.buffer.schema import Column

__all__ = ["Keep", "Retention"]

Keep = str | tuple[str, str | tuple[str, ...]]
_BY_STEP = ("newest", "log-spaced")
_BY_KEY = ("largest", "smallest")


@dataclass(frozen=True)
class Retention:
    """How much an artifact may hold, and what it keeps.

    Args:
        capacity: rows at most; None sets no limit.
        max_bytes: bytes on disk at most; None sets no limit.
        keep: ``"newest"`` rows; ``"log-spaced"`` in steps, from the first to the newest; ``("largest", key)`` or
            ``("smallest", key)``, the rows with the extreme values of a key that holds one number (a NaN goes first).

    Raises:
        SettingsError: a limit is not positive, or ``keep`` names no rule.
    """

    capacity: int | None = None
    max_bytes: int | None = None
    keep: Keep = "newest"

    def __post_init__(self) -> None:
        for name in ("capacity", "max_bytes"):
            limit = getattr(self, name)
            if limit is not None and not (isinstance(limit, int) and limit > 0):
                raise SettingsError(f"{name}={limit!r}: expected a whole number above 0, or None")
        if not _is_rule(self.keep):
            near = did_you_mean(str(self.keep), (*_BY_STEP, *_BY_KEY))
            raise SettingsError(
                f"keep={self.keep!r}{near}; expected 'newest', 'log-spaced', ('largest', key) or ('smallest', key), "
                "a nested key as a tuple of its own"
            )

    def changed(self, capacity: int | None, max_bytes: int | None, keep: Keep | None) -> Retention:
        """Return these limits with those that are given in their place."""
        return Retention(
            self.capacity if capacity is None else capacity,
            self.max_bytes if max_bytes is None else max_bytes,
            self.keep if keep is None else keep,
        )

    @property
    def rule(self) -> str:
        """The name of what is kept."""
        return self.keep if isinstance(self.keep, str) else self.keep[0]

    @property
    def key(self) -> Key | None:
        """The key whose values decide, if one does."""
        return None if isinstance(self.keep, str) else as_key(self.keep[1])

    @property
    def limited(self) -> bool:
        """Whether rows are ever dropped."""
        return self.capacity is not None or self.max_bytes is not None

    def check(self, columns: Mapping[Key, Column], of: str) -> None:
        """Refuse a rule that these columns cannot decide.

        Raises:
            SchemaError: there is no such key, or it holds more than one number.
        """
        if self.key is None:
            return
        if self.key not in columns:
            hint = did_you_mean(key_name(self.key), map(key_name, columns))
            raise SchemaError(f"{of}: keep={self.keep!r} names no key of the row{hint}")
        if columns[self.key].shape not in ((), (1,)) or columns[self.key].dtype.is_complex:
            raise SchemaError(
                f"{of}: keep={self.keep!r} needs one real number a row, {show(self.key)!r} has shape "
                f"{columns[self.key].shape} and dtype {columns[self.key].dtype}"
            )

    def victims(self, n: int, steps: Tensor, values: Tensor | None) -> list[int]:
        """Return the ``n`` rows that go, as positions from first to last.

        Args:
            n: how many go.
            steps: of the rows, in the order they were written.
            values: of :attr:`key`, in that order; None where no key decides.
        """
        if self.rule == "newest":
            return list(range(n))
        if self.rule == "log-spaced":
            return sorted(_most_crowded(n, steps.numpy()))
        score = values.reshape(-1)  # type: ignore[union-attr]
        score = score.to(torch.uint8) if score.dtype == torch.bool else score
        unknown = score.isnan()
        ranked = torch.argsort(score[~unknown], stable=True, descending=self.rule == "smallest")
        order = torch.cat([unknown.nonzero()[:, 0], (~unknown).nonzero()[:, 0][ranked]])
        return sorted(order[:n].tolist())  # of equals, the earlier goes

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        keep = self.keep if self.key is None else [self.rule, list(self.key)]
        return {"capacity": self.capacity, "max_bytes": self.max_bytes, "keep": keep}

    @classmethod
    def from_json(cls, text: dict[str, Any]) -> Retention:
        """Return what :meth:`to_json` wrote."""
        keep = text["keep"]
        keep = keep if isinstance(keep, str) else (keep[0], tuple(keep[1]))
        return cls(text["capacity"], text["max_bytes"], keep)


def _is_rule(keep: Any) -> bool:
    if isinstance(keep, str):
        return keep in _BY_STEP
    if not (isinstance(keep, (tuple, list)) and len(keep) == 2 and keep[0] in _BY_KEY):
        return False
    parts = (keep[1],) if isinstance(keep[1], str) else keep[1]
    return isinstance(parts, (tuple, list)) and bool(parts) and all(isinstance(part, str) for part in parts)


def _most_crowded(n: int, steps: Any) -> list[int]:
    """Drop rows of one step after another, each time of the step without which the gap around it stays smallest.

    Gaps are differences of log(1 + step). The first and the last step stay as long as there are others; within a step
    the rows written first go first.
    """
    distinct, groups = np.unique(steps, return_inverse=True)
    members = np.split(np.argsort(groups, kind="stable"), np.bincount(groups).cumsum()[:-1])
    logs = np.log1p(distinct.clip(min=0))
    gone: list[int] = []
    while len(gone) < n:
        k = 1 + int(np.argmin(logs[2:] - logs[:-2])) if len(logs) > 2 else 0
        gone += members[k][: n - len(gone)].tolist()
        logs = np.delete(logs, k)
        members.pop(k)
    return gone
