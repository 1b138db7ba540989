"""Whether a network can still learn: units that do nothing, representations that collapse."""

from tdhook_train.health.churn import Churn
from tdhook_train.health.dead_units import DeadUnits
from tdhook_train.health.dormant_units import DormantUnits
from tdhook_train.health.effective_rank import EffectiveRank
from tdhook_train.health.feature_rank import FeatureRank
from tdhook_train.health.gradient_covariance import GradientCovariance
from tdhook_train.health.gradient_norms import GradientNorms
from tdhook_train.health.redo import ReDo
from tdhook_train.health.srank import SRank
from tdhook_train.health.stable_rank import StableRank
from tdhook_train.health.target_fit_plasticity import TargetFitPlasticity
from tdhook_train.health.value_calibration import ValueCalibration

__all__ = [
    "Churn",
    "DeadUnits",
    "DormantUnits",
    "EffectiveRank",
    "FeatureRank",
    "GradientCovariance",
    "GradientNorms",
    "ReDo",
    "SRank",
    "StableRank",
    "TargetFitPlasticity",
    "ValueCalibration",
]
