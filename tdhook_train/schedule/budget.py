"""How much of the training's wall time observers may take."""

from __future__ import annotations

from dataclasses import dataclass

from tdhook_train.errors import BudgetError

__all__ = ["Budget"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A share of wall time, held by measuring.

    Args:
        overhead: seconds spent observing for each second of training, e.g. 0.05. A tick that would pass it, judged
            by the cost of the last one, is skipped, and the skip is recorded.
    """

    overhead: float

    def __post_init__(self) -> None:
        if not 0 < self.overhead <= 1:
            raise BudgetError(f"overhead is a share of training time in (0, 1], got {self.overhead}")

    def allows(self, spent_s: float, next_s: float, training_s: float) -> bool:
        """Whether one more tick keeps within the share.

        Args:
            spent_s: seconds spent observing so far.
            next_s: what the next tick is expected to take.
            training_s: seconds of training so far, observing not counted.
        """
        # with nothing measured yet the first tick is free: it sets the estimate
        return spent_s == 0 or spent_s + next_s <= self.overhead * max(training_s, 0.0)
