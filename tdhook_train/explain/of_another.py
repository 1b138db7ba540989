"""What methods share that are about another method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tdhook_train.hooks import HookedModel
from tdhook_train.method import Method

__all__ = ["OfAnother"]


@dataclass(frozen=True)
class OfAnother(Method):
    """A method about another one: it reads what that reads, on the same networks, and refuses what that refuses.

    Args:
        of: the other method.
    """

    of: Method

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.networks is None:
            object.__setattr__(self, "networks", self.of.networks)

    def concerns(self, model: HookedModel) -> bool:
        """Whether both have something to say."""
        return super().concerns(model) and self.of.concerns(model)

    def check(self, models: Mapping[str, HookedModel]) -> None:
        """Refuse what the other refuses as well."""
        super().check(models)
        self.of.check(self.chosen(models))

    def taps(self, model: HookedModel) -> Sequence[str]:
        """What the other reads."""
        return self.of.taps(model)
