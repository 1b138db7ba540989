"""Where methods meet a batch: what they are, and what is carried from one tick to the next."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDictBase

from tdhook_train.observer.measure import Row, Rows, Tick, measure
from tdhook_train.observer.sources import Source
from tdhook_train.observer.subject import Subject
from tdhook_train.schedule import Times

__all__ = ["Measurement", "Station"]


@dataclass(frozen=True)
class Measurement:
    """What was measured on one batch at one moment, and on which weights and data, by their fingerprints."""

    source: str
    now: Times
    rows: list[Row]
    weights: int
    data: int


class Station:
    """Measures one batch after another with the same methods.

    Args:
        methods: of each row.
        seed: of what methods draw.
    """

    def __init__(self, methods: Rows, seed: int) -> None:
        self.methods = methods
        self.seed = seed
        self._previous: dict[str, dict[str, TensorDictBase]] = {}  # by source, then row
        self._memo: dict[str, tuple[int, dict[str, dict[Any, Any]]]] = {}  # by source: of which data

    def forget(self) -> None:
        """Forget the ticks before, as going back to a checkpoint needs."""
        self._previous.clear()
        self._memo.clear()

    def measure(
        self,
        subject: Subject,
        now: Times,
        due: Collection[str],
        on: tuple[str, Source],
        failed: Callable[[str, Exception], None],
    ) -> Measurement:
        """Measure on one batch, with the weights of now.

        Args:
            subject: whose networks.
            now: the moment.
            due: which rows.
            on: the name of a source, and its batch.
            failed: told the row and the error of a method; where it does not raise, that row is left out.
        """
        name, source = on
        methods = {row: self.methods[row] for row in self.methods if row in due}
        previous = self._previous.setdefault(name, {})
        tick = Tick(now, self.seed, {row: previous.get(row) for row in methods}, self._memo_of(name, source))
        with subject.open(tick.generator("model").initial_seed(), source.batch):
            rows = measure(subject, methods, source, tick, failed)
            weights = subject.fingerprint()
        previous |= {row.name: row.measured.tensordict() for row in rows}
        return Measurement(name, now, rows, weights, source.fingerprint)

    def _memo_of(self, name: str, source: Source) -> dict[str, dict[Any, Any]]:
        if not source.fixed:
            return {}
        known = self._memo.get(name)
        if known is None or known[0] != source.fingerprint:
            known = self._memo[name] = (source.fingerprint, {})
        return known[1]
