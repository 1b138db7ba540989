"""What observing costs."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict

__all__ = ["Meter"]

_WARN_SHARE = 0.05
_WARN_AFTER_S = 30.0  # before that a share says little: the first tick pays for everything that is made once


class Meter:
    """Wall time spent observing, in all and by method, beside the wall time of the training."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.spent_s = 0.0
        self.last_s = 0.0
        self.ticks = 0
        self.by_method_s: dict[str, float] = defaultdict(float)
        self.beside_s = 0.0  # spent by a process in the background, which is not counted above
        self.dropped = 0  # ticks that it had no room for
        self._warned = False

    @property
    def elapsed_s(self) -> float:
        """Seconds since the observer began, observing included."""
        return time.perf_counter() - self.began

    @property
    def training_s(self) -> float:
        """Seconds since the observer began, observing not counted."""
        return self.elapsed_s - self.spent_s

    @property
    def share(self) -> float:
        """Seconds observing for each second of training."""
        return self.spent_s / max(self.training_s, 1e-9)

    def more(self, seconds: float) -> None:
        """Count time spent between ticks."""
        self.spent_s += seconds

    def add(self, seconds: float, *, budgeted: bool) -> None:
        """Count one tick, and warn once where observing has become dear and no budget bounds it."""
        self.spent_s += seconds
        self.last_s = seconds
        self.ticks += 1
        if not budgeted and not self._warned and self.elapsed_s > _WARN_AFTER_S and self.share > _WARN_SHARE:
            self._warned = True
            warnings.warn(
                f"observing takes {self.share:.1%} of training time; Budget(overhead={_WARN_SHARE}) bounds it, "
                "fewer ticks or methods lower it",
                stacklevel=2,
            )
