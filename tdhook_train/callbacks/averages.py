"""Running averages of the weights that a fit trains."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["average"]


def average(trainer: Trainer) -> nn.Module:
    """Return the module that holds the averaged weights.

    Raises:
        MisconfigurationException: no callback averages them.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for held in vars(callback).values():
            if isinstance(held, AveragedModel):
                return held.module
    raise MisconfigurationException("weights='average' needs a callback that averages them, such as WeightAveraging")
