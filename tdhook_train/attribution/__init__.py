"""What a model's outputs rest on, feature by feature."""

from tdhook_train.attribution.feature_ablation import FeatureAblation
from tdhook_train.attribution.input_x_gradient import InputXGradient
from tdhook_train.attribution.integrated_gradients import IntegratedGradients
from tdhook_train.attribution.lrp import LRP
from tdhook_train.attribution.saliency import Saliency

__all__ = ["LRP", "FeatureAblation", "InputXGradient", "IntegratedGradients", "Saliency"]
