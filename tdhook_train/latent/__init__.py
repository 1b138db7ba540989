"""What layers know, which of their units carry a decision, and what moving them does."""

from tdhook_train.latent.ablate import Ablate
from tdhook_train.latent.activation_addition import ActivationAddition
from tdhook_train.latent.activation_cache import ActivationCache
from tdhook_train.latent.activation_patching import ActivationPatching
from tdhook_train.latent.atp_star import AtPStar
from tdhook_train.latent.attribution_patching import AttributionPatching
from tdhook_train.latent.cka import Cka
from tdhook_train.latent.logistic_probe import LogisticProbe
from tdhook_train.latent.path_patching import PathPatching
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
    "AtPStar",
    "AttributionPatching",
    "Cka",
    "Kl",
    "LogProb",
    "LogisticProbe",
    "LogitDifference",
    "NegativeLoss",
    "NormalLogProb",
    "PathPatching",
    "RidgeProbe",
    "SteeringVectors",
    "TanhNormalLogProb",
]
