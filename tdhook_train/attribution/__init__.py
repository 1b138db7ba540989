"""What a model's outputs rest on, feature by feature."""

from tdhook_train.attribution.integrated_gradients import IntegratedGradients
from tdhook_train.attribution.saliency import Saliency

__all__ = ["IntegratedGradients", "Saliency"]
