"""What a model's outputs rest on, feature by feature."""

from tdhook_train.attribution.activation_maximisation import ActivationMaximisation
from tdhook_train.attribution.deconvolution import Deconvolution
from tdhook_train.attribution.deep_lift import DeepLift
from tdhook_train.attribution.feature_ablation import FeatureAblation
from tdhook_train.attribution.grad_cam import GradCam
from tdhook_train.attribution.guided_backpropagation import GuidedBackpropagation
from tdhook_train.attribution.input_x_gradient import InputXGradient
from tdhook_train.attribution.integrated_gradients import IntegratedGradients
from tdhook_train.attribution.saliency import Saliency

__all__ = [
    "ActivationMaximisation",
    "Deconvolution",
    "DeepLift",
    "FeatureAblation",
    "GradCam",
    "GuidedBackpropagation",
    "InputXGradient",
    "IntegratedGradients",
    "Saliency",
]
