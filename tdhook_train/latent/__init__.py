"""What layers know, which of their units carry a decision, and what moving them does."""

from tdhook_train.explain.tcav import Tcav
from tdhook_train.latent.ablate import Ablate
from tdhook_train.latent.activation_addition import ActivationAddition
from tdhook_train.latent.activation_cache import ActivationCache
from tdhook_train.latent.activation_patching import ActivationPatching
from tdhook_train.latent.atp_star import AtPStar
from tdhook_train.latent.attention_patterns import AttentionPatterns
from tdhook_train.latent.attention_rollout import AttentionRollout
from tdhook_train.latent.attribution_patching import AttributionPatching
from tdhook_train.latent.bilinear_probe import BilinearProbe
from tdhook_train.latent.cav import Cav
from tdhook_train.latent.cka import Cka
from tdhook_train.latent.control_task import ControlTask
from tdhook_train.latent.direction_edit import DirectionEdit
from tdhook_train.latent.dynamics import acceleration, projection, velocity
from tdhook_train.latent.erase import Erase
from tdhook_train.latent.gradient_direction import GradientDirection
from tdhook_train.latent.ica_direction import IcaDirection
from tdhook_train.latent.leace import Leace
from tdhook_train.latent.logistic_direction import LogisticDirection
from tdhook_train.latent.logistic_probe import LogisticProbe
from tdhook_train.latent.logit_lens import LogitLens
from tdhook_train.latent.max_activating import MaxActivating
from tdhook_train.latent.mdl_probe import MdlProbe
from tdhook_train.latent.mean_difference_direction import MeanDifferenceDirection
from tdhook_train.latent.mean_difference_probe import MeanDifferenceProbe
from tdhook_train.latent.path_patching import PathPatching
from tdhook_train.latent.probe_transfer import ProbeTransfer
from tdhook_train.latent.ridge_probe import RidgeProbe
from tdhook_train.latent.sklearn_probe import SklearnProbe
from tdhook_train.latent.steering_vectors import SteeringVectors
from tdhook_train.latent.tuned_lens import TunedLens
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
    "Ablate",
    "ActivationAddition",
    "ActivationCache",
    "ActivationPatching",
    "AtPStar",
    "AttentionPatterns",
    "AttentionRollout",
    "AttributionPatching",
    "BilinearProbe",
    "Cav",
    "Cka",
    "ControlTask",
    "DirectionEdit",
    "Erase",
    "GradientDirection",
    "IcaDirection",
    "Kl",
    "Leace",
    "LogProb",
    "LogisticDirection",
    "LogisticProbe",
    "LogitDifference",
    "LogitGap",
    "LogitLens",
    "MaxActivating",
    "MdlProbe",
    "MeanDifferenceDirection",
    "MeanDifferenceProbe",
    "NegativeLoss",
    "NormalLogProb",
    "PathPatching",
    "ProbeTransfer",
    "RidgeProbe",
    "SklearnProbe",
    "SteeringVectors",
    "TanhNormalLogProb",
    "Tcav",
    "TunedLens",
    "acceleration",
    "projection",
    "velocity",
]
