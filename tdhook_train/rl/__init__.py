"""The TorchRL front door: a loss, observed."""

from tdhook_train.isolation import networks
from tdhook_train.rl.observed_loss import ObservedLoss, observe_loss

__all__ = ["ObservedLoss", "networks", "observe_loss"]
