"""What layers know, and which of their units carry a decision."""

from tdhook_train.latent.activation_patching import ActivationPatching
from tdhook_train.latent.ridge_probe import RidgeProbe

__all__ = ["ActivationPatching", "RidgeProbe"]
