"""What a model's outputs rest on, feature by feature."""

from tdhook_train.attribution.concept_attribution import ConceptAttribution
from tdhook_train.attribution.feature_ablation import FeatureAblation
from tdhook_train.attribution.input_x_gradient import InputXGradient
from tdhook_train.attribution.integrated_gradients import IntegratedGradients
from tdhook_train.attribution.saliency import Saliency
from tdhook_train.attribution.tcav import Tcav

__all__ = ["ConceptAttribution", "FeatureAblation", "InputXGradient", "IntegratedGradients", "Saliency", "Tcav"]
