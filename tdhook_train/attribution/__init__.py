"""What a model's outputs rest on, feature by feature."""

from tdhook_train.attribution.feature_ablation import FeatureAblation
from tdhook_train.attribution.greydanus import Greydanus
from tdhook_train.attribution.input_x_gradient import InputXGradient
from tdhook_train.attribution.integrated_gradients import IntegratedGradients
from tdhook_train.attribution.kernel_shap import (KernelShap)
from tdhook_train.attribution.lime import (Lime)
from tdhook_train.attribution.lrp import (LRP)
from tdhook_train.attribution.occlusion import (Occlusion)
from tdhook_train.attribution.saliency import Saliency
from tdhook_train.attribution.sarfa import Sarfa
from tdhook_train.attribution.shapley_sampling import ShapleySampling
from tdhook_train.attribution.sobol import Sobol

__all__ = ["FeatureAblation", "Greydanus", "InputXGradient", "IntegratedGradients", "KernelShap", "LRP", "Lime", "Occlusion", "Saliency", "Sarfa", "ShapleySampling", "Sobol"]
