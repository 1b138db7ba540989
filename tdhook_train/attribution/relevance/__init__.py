"""Rules by which relevance is shared among the inputs of a layer, and composites of them."""

from tdhook_train.attribution.relevance.composites import (
    ByName,
    ByType,
    Composite,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
)
from tdhook_train.attribution.relevance.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Norm,
    Pass,
    RelevanceRule,
    WSquare,
    ZBox,
    Zero,
    ZPlus,
)

__all__ = [
    "AlphaBeta",
    "ByName",
    "ByType",
    "Composite",
    "Epsilon",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "Flat",
    "Gamma",
    "Norm",
    "Pass",
    "RelevanceRule",
    "WSquare",
    "ZBox",
    "ZPlus",
    "Zero",
]
