"""Running averages of the weights that a fit trains."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["average", "in_turn"]


def average(trainer: Trainer) -> nn.Module:
    """Return the module that holds the averaged weights.

    Raises:
        MisconfigurationException: no callback averages them.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (held := _average_of(callback)) is not None:
            return held.module
    raise MisconfigurationException("weights='average' needs a callback that averages them, such as WeightAveraging")


def in_turn(callbacks: list[Callback], one: Callback, *, after: bool) -> list[Callback]:
    """Put one of some callbacks before all that average weights, or after them; the others keep their order.

    They update the average at the end of a batch, and put it into the model at the end of the training.
    """
    others = [callback for callback in callbacks if callback is not one]
    averaging = [i for i, other in enumerate(others) if _averages(other)]
    place = callbacks.index(one)
    if averaging:
        place = max(place, averaging[-1] + 1) if after else min(place, averaging[0])
    return [*others[:place], one, *others[place:]]


def _averages(callback: Callback) -> bool:
    return isinstance(callback, StochasticWeightAveraging) or _average_of(callback) is not None


def _average_of(callback: Callback) -> AveragedModel | None:
    return next((held for held in vars(callback).values() if isinstance(held, AveragedModel)), None)
