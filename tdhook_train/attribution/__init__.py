"""What a model's outputs rest on, feature by feature."""

from tdhook_train.attribution.feature_ablation import FeatureAblation
from tdhook_train.attribution.input_x_gradient import InputXGradient
from tdhook_train.attribution.integrated_gradients import IntegratedGradients
from tdhook_train.attribution.saliency import Saliency

__all__ = ["FeatureAblation", "InputXGradient", "IntegratedGradients", "Saliency"]
