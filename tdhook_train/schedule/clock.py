"""How far a training is, on every scale at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Clock", "Times", "last_said"]


@dataclass(frozen=True)
class Times:
    """A moment of a training."""

    step: int = 0  # optimizer steps behind the weights
    frames: int = 0  # environment frames collected
    epoch: int = 0
    batches: int = 0  # batches seen by the observer
    seconds: float = 0.0  # wall time since the observer began


@dataclass
class Clock:
    """The present moment and the one at which triggers were last asked, so that they can fire on crossing.

    Set ``frames`` and ``epoch`` from the training loop: ``observer.clock.frames = collected``.
    """

    step: int = 0
    frames: int = 0
    epoch: int = 0
    batches: int = 0
    seconds: float = 0.0
    before: Times | None = field(default=None)  # None until triggers were asked for the first time
    fresh: dict[str, list[Any]] = field(default_factory=dict, repr=False)  # rows since then, by name: key -> tensor
    known: dict[str, Any] = field(default_factory=dict, repr=False)  # what the rows before said last

    @property
    def now(self) -> Times:
        """The present moment, frozen."""
        return Times(self.step, self.frames, self.epoch, self.batches, self.seconds)

    def passed(self) -> None:
        """Let the present moment pass without asking triggers; rows that have come are new to them later."""
        self.before = self.now

    def asked(self) -> None:
        """Remember the present moment as the last at which triggers were asked."""
        self.passed()
        if self.fresh:
            for name, rows in self.fresh.items():
                self.known[name] = last_said([self.known.get(name, {}), *rows])
            self.fresh = {}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint: the present moment, and below ``before`` the last that triggers saw."""
        return asdict(self.now) | {"before": None if self.before is None else asdict(self.before)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint: boundaries crossed before it do not fire again."""
        moment = {name: value for name, value in state.items() if name != "before"}
        for name, value in asdict(Times(**moment)).items():
            setattr(self, name, value)
        before = state.get("before", moment)
        self.before = None if before is None else Times(**before)


def last_said(rows: Sequence[Mapping[Any, Tensor]]) -> dict[Any, Tensor]:
    """Return the last value of each key that says something: that is not NaN throughout."""
    found: dict[Any, Tensor] = {}
    for row in rows:
        found |= {key: value for key, value in row.items() if key not in found or not value.isnan().all()}
    return found
