"""What a model's outputs rest on, feature by feature."""

from tdhook_train.attribution.conductance import Conductance
from tdhook_train.attribution.feature_ablation import FeatureAblation
from tdhook_train.attribution.gradient_shap import GradientShap
from tdhook_train.attribution.input_conductance import InputConductance
from tdhook_train.attribution.input_x_gradient import InputXGradient
from tdhook_train.attribution.integrated_gradients import IntegratedGradients
from tdhook_train.attribution.layer_integrated_gradients import LayerIntegratedGradients
from tdhook_train.attribution.saliency import Saliency
from tdhook_train.attribution.smooth_grad import SmoothGrad
from tdhook_train.attribution.square_grad import SquareGrad
from tdhook_train.attribution.var_grad import VarGrad
from tdhook_train.ops.objectives import (
    Kl,
    LogitDifference,
    LogProb,
    NegativeLoss,
    NormalLogProb,
    TanhNormalLogProb,
)

__all__ = [
    "Conductance",
    "FeatureAblation",
    "GradientShap",
    "InputConductance",
    "InputXGradient",
    "IntegratedGradients",
    "Kl",
    "LayerIntegratedGradients",
    "LogProb",
    "LogitDifference",
    "NegativeLoss",
    "NormalLogProb",
    "Saliency",
    "SmoothGrad",
    "SquareGrad",
    "TanhNormalLogProb",
    "VarGrad",
]
