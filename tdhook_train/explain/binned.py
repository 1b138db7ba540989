"""What becomes of an output without, or with only, some shares of the features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain.masked import Masked

__all__ = ["Binned"]


@dataclass(frozen=True)
class Binned(Masked):
    """A score averaged over several shares of the features.

    Args:
        bins: shares of all units, between 0 and 1, each rounded up to whole units.
    """

    bins: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "bins", tuple(self.bins))
        if not self.bins or any(not 0 < share <= 1 for share in self.bins):
            raise SettingsError(f"{type(self).__name__} needs bins above 0 and up to 1, got {self.bins}")

    def counts(self, free: Tensor) -> Tensor:
        """Round the number of units up, but for the error of the product."""
        shares = torch.tensor(self.bins, dtype=torch.float64, device=free.device)
        return (free[:, None] * shares - 1e-9).ceil().long()
