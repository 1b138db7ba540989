"""The TorchRL front door: a loss, observed."""

from tdhook_train.isolation import networks
from tdhook_train.rl.ablated_return import AblatedReturn
from tdhook_train.rl.observed_loss import ObservedLoss, observe_loss
from tdhook_train.rl.observer_hook import ObserverHook

__all__ = ["AblatedReturn", "ObservedLoss", "ObserverHook", "networks", "observe_loss"]
