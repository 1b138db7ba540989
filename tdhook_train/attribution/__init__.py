"""What a model's outputs rest on, feature by feature."""

from tdhook_train.attribution.activation_maximisation import ActivationMaximisation
from tdhook_train.attribution.concept_attribution import ConceptAttribution
from tdhook_train.attribution.conductance import Conductance
from tdhook_train.attribution.deconvolution import Deconvolution
from tdhook_train.attribution.deep_lift import DeepLift
from tdhook_train.attribution.feature_ablation import FeatureAblation
from tdhook_train.attribution.grad_cam import GradCam
from tdhook_train.attribution.gradient_shap import GradientShap
from tdhook_train.attribution.greydanus import Greydanus
from tdhook_train.attribution.guided_backpropagation import GuidedBackpropagation
from tdhook_train.attribution.input_conductance import InputConductance
from tdhook_train.attribution.input_x_gradient import InputXGradient
from tdhook_train.attribution.integrated_gradients import IntegratedGradients
from tdhook_train.attribution.kernel_shap import KernelShap
from tdhook_train.attribution.layer_integrated_gradients import LayerIntegratedGradients
from tdhook_train.attribution.lime import Lime
from tdhook_train.attribution.lrp import LRP
from tdhook_train.attribution.occlusion import Occlusion
from tdhook_train.attribution.saliency import Saliency
from tdhook_train.attribution.sarfa import Sarfa
from tdhook_train.attribution.shapley_sampling import ShapleySampling
from tdhook_train.attribution.smooth_grad import SmoothGrad
from tdhook_train.attribution.sobol import Sobol
from tdhook_train.attribution.square_grad import SquareGrad
from tdhook_train.attribution.var_grad import VarGrad
from tdhook_train.explain.tcav import Tcav
from tdhook_train.ops.objectives import (
    Kl,
    LogitDifference,
    LogitGap,
    LogProb,
    NegativeLoss,
    NormalLogProb,
    TanhNormalLogProb,
)

__all__ = [
    "LRP",
    "ActivationMaximisation",
    "ConceptAttribution",
    "Conductance",
    "Deconvolution",
    "DeepLift",
    "FeatureAblation",
    "GradCam",
    "GradientShap",
    "Greydanus",
    "GuidedBackpropagation",
    "InputConductance",
    "InputXGradient",
    "IntegratedGradients",
    "KernelShap",
    "Kl",
    "LayerIntegratedGradients",
    "Lime",
    "LogProb",
    "LogitDifference",
    "LogitGap",
    "NegativeLoss",
    "NormalLogProb",
    "Occlusion",
    "Saliency",
    "Sarfa",
    "ShapleySampling",
    "SmoothGrad",
    "Sobol",
    "SquareGrad",
    "TanhNormalLogProb",
    "Tcav",
    "VarGrad",
]
