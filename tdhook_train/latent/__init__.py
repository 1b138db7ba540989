"""What layers know, which of their units carry a decision, and what moving them does."""

from tdhook_train.explain.tcav import Tcav
from tdhook_train.latent.ablate import Ablate
from tdhook_train.latent.activation_addition import ActivationAddition
from tdhook_train.latent.activation_cache import ActivationCache
from tdhook_train.latent.activation_patching import ActivationPatching
from tdhook_train.latent.cav import Cav
from tdhook_train.latent.cka import Cka
from tdhook_train.latent.direction_edit import DirectionEdit
from tdhook_train.latent.dynamics import acceleration, projection, velocity
from tdhook_train.latent.erase import Erase
from tdhook_train.latent.gradient_direction import GradientDirection
from tdhook_train.latent.ica_direction import IcaDirection
from tdhook_train.latent.leace import Leace
from tdhook_train.latent.logistic_direction import LogisticDirection
from tdhook_train.latent.logistic_probe import LogisticProbe
from tdhook_train.latent.mean_difference_direction import MeanDifferenceDirection
from tdhook_train.latent.ridge_probe import RidgeProbe
from tdhook_train.latent.steering_vectors import SteeringVectors
from tdhook_train.ops.objectives import (
    Kl,
    LogitDifference,
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
    "Cav",
    "Cka",
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
    "MeanDifferenceDirection",
    "NegativeLoss",
    "NormalLogProb",
    "RidgeProbe",
    "SteeringVectors",
    "TanhNormalLogProb",
    "Tcav",
    "acceleration",
    "projection",
    "velocity",
]
