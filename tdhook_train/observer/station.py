"""Where methods meet a batch: what they are, and what is carried from one tick to the next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tdhook_train.observer.measure import Row, Rows, Tick, measure
from tdhook_train.observer.sources import Source
from tdhook_train.observer.subject import Subject
from tdhook_train.schedule import Times

__all__ = ["Measurement", "OfData", "Station"]


@dataclass(frozen=True)
class Measurement:
    """What was measured on one batch at one moment, and on which weights and data, by their fingerprints."""

    source: str
    now: Times
    rows: list[Row]
    weights: int
    data: int
    networks: tuple[str, ...] = ()


@dataclass(frozen=True)
class OfData:
    """What is kept of one batch, whose data have this fingerprint; 0 where they change every time."""

    data: int
    kept: dict[str, Any]


class Station:
    """Measures one batch after another with the same methods.

    Args:
        methods: of each row.
        seed: of what methods draw.
    """

    def __init__(self, methods: Rows, seed: int) -> None:
        self.methods = methods
        self.seed = seed
        self._previous: dict[str, OfData] = {}  # by source: the last rows
        self._memo: dict[str, OfData] = {}  # by source, for those that stay the same from tick to tick

    def go_back(self, last: Mapping[str, OfData]) -> None:
        """Forget the ticks before, but for these rows, by source: as going back to a checkpoint needs."""
        self._previous = {source: OfData(rows.data, dict(rows.kept)) for source, rows in last.items()}
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
        previous = _same(self._previous, name, source.fingerprint if source.fixed else 0)
        memo = _same(self._memo, name, source.fingerprint) if source.fixed else {}
        tick = Tick(now, self.seed, {row: previous.get(row) for row in methods}, memo)
        with subject.open(tick.generator("model").initial_seed(), source.batch):
            rows = measure(subject, methods, source, tick, failed)
            weights = subject.fingerprint()
        previous |= {row.name: row.measured.tensordict() for row in rows}
        return Measurement(name, now, rows, weights, source.fingerprint, tuple(subject.networks))


def _same(kept: dict[str, OfData], source: str, data: int) -> dict[str, Any]:
    """Return what is kept of a source, nothing where its data has changed."""
    if source not in kept or kept[source].data != data:
        kept[source] = OfData(data, {})
    return kept[source].kept
