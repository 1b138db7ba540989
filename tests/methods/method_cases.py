"""One row a public method: its settings, others that differ, some that are refused, and the keys it writes."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from method_env import Answering
from sklearn.cluster import KMeans
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from tensordict import TensorDict
from torch import nn

from tdhook_train import Method, attribution, circuits, health, latent, metrics, weights
from tdhook_train.attribution import (
    LRP,
    ActivationMaximisation,
    ConceptAttribution,
    Conductance,
    Deconvolution,
    DeepLift,
    FeatureAblation,
    GradCam,
    GradientShap,
    Greydanus,
    GuidedBackpropagation,
    InputConductance,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LayerIntegratedGradients,
    Lime,
    Occlusion,
    Saliency,
    Sarfa,
    ShapleySampling,
    SmoothGrad,
    Sobol,
    SquareGrad,
    Tcav,
    VarGrad,
)
from tdhook_train.circuits import RelP
from tdhook_train.health import (
    Churn,
    DeadUnits,
    DormantUnits,
    EffectiveRank,
    FeatureRank,
    GradientCovariance,
    GradientNorms,
    ReDo,
    SRank,
    StableRank,
    TargetFitPlasticity,
    ValueCalibration,
)
from tdhook_train.latent import (
    Ablate,
    ActivationAddition,
    ActivationCache,
    ActivationPatching,
    AtPStar,
    AttentionPatterns,
    AttentionRollout,
    AttributionPatching,
    BilinearProbe,
    Cav,
    Cka,
    ControlTask,
    DirectionEdit,
    Erase,
    GradientDirection,
    IcaDirection,
    Leace,
    LogisticDirection,
    LogisticProbe,
    LogitLens,
    MaxActivating,
    MdlProbe,
    MeanDifferenceDirection,
    MeanDifferenceProbe,
    PathPatching,
    ProbeTransfer,
    RidgeProbe,
    SklearnProbe,
    SteeringVectors,
    TunedLens,
)
from tdhook_train.metrics import (
    Aopc,
    CascadingRandomisation,
    Comprehensiveness,
    Deletion,
    Infidelity,
    Insertion,
    MaxSensitivity,
    Stability,
    Sufficiency,
)
from tdhook_train.rl import AblatedReturn
from tdhook_train.weights import WeightDistance

FAMILIES = (attribution, circuits, health, latent, metrics, weights)
EXPORTED = [getattr(family, name) for family in FAMILIES for name in family.__all__]
PUBLIC = {one for one in EXPORTED if isinstance(one, type) and issubclass(one, Method)}  # others are functions
PUBLIC |= {AblatedReturn}  # outside the families, since it needs TorchRL


@dataclass(frozen=True)
class Case:
    make: type[Method]
    settings: dict[str, Any]
    other: dict[str, Any]
    refused: dict[str, list[Any]]
    keys: frozenset[Any]
    activation: type[nn.Module] = nn.Tanh  # of the model, where a method goes by a certain one

    def method(self):
        return self.make(**self.settings)


class Attending(nn.Module):
    """Attention among the features of a row, in the place of an activation."""

    def __init__(self):
        super().__init__()
        self.heads = nn.MultiheadAttention(1, 1, batch_first=True)

    def forward(self, x):
        parts = x.unsqueeze(-1)
        return self.heads(parts, parts, parts, need_weights=False)[0].squeeze(-1)


def double(_layer, output):
    return output * 2


def nearest(td):
    return td["input"].round()


def above_zero(td):
    return td["input"][:, 0] > 0


JUDGED_NOT = [None, DeadUnits(), Saliency(reduction="mean")]
MASKED_NOT = {"baseline": ["zeros"], "unit": ["word"], "by": ["size"], "orders": [0], "reduction": ["sum"]}
FIVE = ((1.0,) * 5, (0.2,) * 5, (0.0,) * 5)
TWO = {"targets": [("output", 0), ("output", 1)], "rows": 6}
DIRECTIONS = frozenset({("direction", "0"), ("direction", "1"), "separation", "accuracy", "auc", "reason"})
PATCHED = frozenset({"effect", "normalised", "gap", "unit_effect", "unit_normalised"})
AGREEMENT = {"agreement", "agreement_overall", "top_layer", "top_part", "top_estimate", "top_exact"}
PAIRED_NOT = {
    "pairs": [1],
    "targets": [(0,)],
    "parts": [(), "head", "neuron"],
    "heads": [2],
    "side": ["inputs"],
    "by": ["median"],
    "way": ["back"],
    "max_bytes": [0],
}
AB = {"groups": {"a": [0], "b": [1, 2]}}


def reads_three(_path, module):
    return getattr(module, "in_features", None) == 3


CASES = (
    Case(
        IntegratedGradients,
        {"targets": [("output", 0), ("output", 1)], "points": 8, "rows": 6},
        {"baseline": "mean"},
        {
            "points": [0],
            "rows": [0],
            "rows_per_pass": [0],
            "baseline": ["zeros"],
            "quadrature": ["simpson"],
            "targets": [(0,)],
        },
        frozenset({("attr", "input"), "delta"}),
    ),
    Case(
        FeatureAblation,
        {"targets": [("output", 0), ("output", 1)], "rows": 6, "groups": {"a": [0], "b": [1, 2]}},
        {"baseline": "mean"},
        {"groups": [{}], "patch": [0], "references": [0], "baseline": ["zeros"]},
        frozenset({("attr", "input"), "shares"}),
    ),
    Case(
        Greydanus,
        TWO | AB,
        {"baseline": "mean"},
        {"spacing": [0], "radius": [0.0], "blur": [-1.0], "reduction": ["sum"], "patch": [0]},
        frozenset({("attr", "input"), "shares"}),
    ),
    Case(
        KernelShap,
        TWO | AB,
        {"samples": 10},
        {"samples": [1], "patch": [0], "baseline": ["zeros"]},
        frozenset({("attr", "input"), "shares"}),
    ),
    Case(
        Lime,
        TWO | AB | {"samples": 20},
        {"distance": "euclidean"},
        {"samples": [1], "distance": ["l1"], "kernel_width": [0.0], "alpha": [-1.0, float("nan")]},
        frozenset({("attr", "input"), "shares", "r2"}),
    ),
    Case(
        Occlusion,
        TWO | {"window": 2},
        {"window": (1,)},
        {"window": [0, (), (2, 0)], "stride": [0, ()], "baseline": ["zeros"]},
        frozenset({("attr", "input")}),
    ),
    Case(
        Sarfa,
        TWO | AB,
        {"action": "each"},
        {"action": ["best"], "spacing": [0], "blur": [0.0], "patch": [0]},
        frozenset({("attr", "input"), "shares"}),
    ),
    Case(
        ShapleySampling,
        TWO | AB | {"permutations": 3},
        {"permutations": 4},
        {"permutations": [0], "groups": [{}]},
        frozenset({("attr", "input"), "shares"}),
    ),
    Case(
        Sobol,
        TWO | AB | {"samples": 8},
        {"samples": 16},
        {"samples": [1], "references": [0]},
        frozenset({("attr", "input"), "shares"}),
    ),
    Case(
        InputXGradient,
        {"targets": [("output", 0), ("output", 1)], "rows": 6},
        {"rows": 5},
        {"rows": [0], "max_bytes": [0], "side": ["inputs"], "reduction": ["sum"], "targets": [(0,)]},
        frozenset({("attr", "input")}),
    ),
    Case(
        LRP,
        {"targets": [("output", 0), ("output", 1)], "rows": 6},
        {"composite": "epsilon_plus_flat"},
        {"rows": [0], "composite": ["epsilon", 3], "through": [{}, {"0": ()}, {"0": (-1,)}, {"0": (0.0,)}, {"0": "1"}]},
        frozenset({("attr", "input")}),
    ),
    Case(
        Saliency,
        {"targets": [("output", 0), ("output", 1)], "rows": 6},
        {"score": "absolute"},
        {"rows": [0], "score": ["abs"], "targets": [(0,)]},
        frozenset({("attr", "input")}),
    ),
    *(
        Case(
            kind,
            {"targets": [("output", 0), ("output", 1)], "samples": 4, "rows": 6},
            {"noise": 0.5},
            {"samples": [0], "noise": [-0.1, float("nan")], "rows": [0]},
            frozenset({("attr", "input")}),
        )
        for kind in (SmoothGrad, SquareGrad, VarGrad)
    ),
    Case(
        GradientShap,
        {"targets": [("output", 0), ("output", 1)], "samples": 4, "rows": 6, "baseline": "rows"},
        {"baseline": "mean"},
        {"samples": [0], "noise": [-0.1], "references": [0], "baseline": ["zeros"]},
        frozenset({("attr", "input"), "delta"}),
    ),
    Case(
        LayerIntegratedGradients,
        {"layers": ("0", "1"), "targets": [("output", 0), ("output", 1)], "points": 4, "rows": 6},
        {"points": 5},
        {"layers": [None], "points": [0], "quadrature": ["simpson"]},
        frozenset((what, layer) for what in ("attr", "delta") for layer in "01"),
    ),
    Case(
        Conductance,
        {"layers": ("0", "1"), "targets": [("output", 0), ("output", 1)], "points": 4, "rows": 6},
        {"baseline": "mean"},
        {"layers": [None], "points": [0], "baseline": ["zeros"]},
        frozenset((what, layer) for what in ("attr", "delta") for layer in "01"),
    ),
    Case(
        InputConductance,
        {"through": reads_three, "units": (0, 2), "targets": [("output", 0), ("output", 1)], "points": 4, "rows": 6},
        {"units": None},
        {"through": ["", None], "units": [(), (-1,), (0.5,)], "points": [0]},
        frozenset({("attr", "input")}),
    ),
    Case(
        Aopc,
        {"of": Saliency([("output", 0), ("output", 1)], rows=6)},
        {"steps": 3},
        {"of": JUDGED_NOT, "steps": [0], "units_per_step": [0]} | MASKED_NOT,
        frozenset(Aopc.writes),
    ),
    Case(
        CascadingRandomisation,
        {"of": Saliency([("output", 0), ("output", 1)], rows=6), "layers": ("0", "1", "2")},
        {"layers": "0"},
        {"of": JUDGED_NOT, "reduction": ["sum"]},
        frozenset(CascadingRandomisation.writes),
    ),
    Case(
        Comprehensiveness,
        {"of": Saliency([("output", 0), ("output", 1)], rows=6)},
        {"bins": (0.5,)},
        {"of": JUDGED_NOT, "bins": [(), (0.0,), (1.5,)]} | MASKED_NOT,
        frozenset(Comprehensiveness.writes),
    ),
    Case(
        Deletion,
        {"of": IntegratedGradients([("output", 0), ("output", 1)], rows=6), "steps": 4},
        {"reduction": "none"},
        {"of": JUDGED_NOT, "steps": [0]} | MASKED_NOT,
        frozenset(Deletion.writes),
    ),
    Case(
        Infidelity,
        {"of": Saliency([("output", 0), ("output", 1)], rows=6)},
        {"unit": "contribution"},
        {
            "of": JUDGED_NOT,
            "unit": ["gradient"],
            "perturb": ["square"],
            "noise": [0.0],
            "samples": [0],
            "baseline": ["x"],
        },
        frozenset(Infidelity.writes),
    ),
    Case(
        Insertion,
        {"of": IntegratedGradients([("output", 0), ("output", 1)], rows=6), "steps": 4},
        {"reduction": "none"},
        {"of": JUDGED_NOT, "steps": [0]} | MASKED_NOT,
        frozenset(Insertion.writes),
    ),
    Case(
        MaxSensitivity,
        {"of": Saliency([("output", 0), ("output", 1)], rows=6)},
        {"radius": 0.1},
        {"of": JUDGED_NOT, "radius": [0.0], "samples": [0]},
        frozenset(MaxSensitivity.writes),
    ),
    Case(
        Stability,
        {"of": Saliency([("output", 0), ("output", 1)], rows=6)},
        {"top": 2},
        {"of": JUDGED_NOT, "top": [0]},
        frozenset({*Stability.writes, ("attr", "input")} - {"attr"}),
    ),
    Case(
        Sufficiency,
        {"of": Saliency([("output", 0), ("output", 1)], rows=6)},
        {"bins": (0.5,)},
        {"of": JUDGED_NOT, "bins": [(), (0.0,), (1.5,)]} | MASKED_NOT,
        frozenset(Sufficiency.writes),
    ),
    Case(
        ActivationMaximisation,
        {"layers": ("0", "1"), "units": (0, 1), "steps": 4, "start": "noise"},
        {"lr": 0.2},
        {
            "steps": [0],
            "lr": [0.0, float("nan")],
            "penalty": [-1.0],
            "start": ["zeros"],
            "bounds": [(1.0, 0.0)],
            "units": [(), (-1,)],
        },
        frozenset({("optimum", "input"), "activation", "start"}),
    ),
    Case(
        DeepLift,
        {"targets": [("output", 0), ("output", 1)], "rows": 6},
        {"baseline": "mean"},
        {"references": [0], "baseline": ["zeros"], "rows": [0], "targets": [(0,)]},
        frozenset({("attr", "input"), "delta"}),
    ),
    Case(
        GradCam,
        {"targets": [("output", 0), ("output", 1)], "layers": ("0", "1"), "rows": 6},
        {"variant": "guided"},
        {"variant": ["both"], "rows": [0], "targets": [(0,)]},
        frozenset({("attr", "0"), ("attr", "1")}),
    ),
    *(
        Case(
            kind,
            {"targets": [("output", 0), ("output", 1)], "rows": 6},
            {"rows": 5},
            {"rows": [0], "side": ["inputs"], "targets": [(0,)]},
            frozenset({("attr", "input")}),
            nn.ReLU,
        )
        for kind in (Deconvolution, GuidedBackpropagation)
    ),
    Case(
        ConceptAttribution,
        {"attribution": Saliency(targets=[("output", 0), ("output", 1)], rows=6), "at": "0", "concept": above_zero},
        {"cav": "logistic"},
        {
            "attribution": [3, FeatureAblation()],
            "direction": [(1.0, 0.0)],
            "cav": ["means"],
            "C": [0.0],
            "concept": [(0,)],
            "explains": ["output", "concept"],
        },
        frozenset({("attr", "input"), ("direction", "0")}),
    ),
    Case(
        Tcav,
        {"layers": ("0", "1"), "concept": above_zero, "targets": [("output", 0), ("output", 1)], "nulls": 5},
        {"cav": "logistic"},
        {
            "concept": [None, (0,)],
            "among": [(0,)],
            "cav": ["means"],
            "C": [0.0],
            "nulls": [-1, 1],
            "reduction": ["mean"],
            "side": ["input"],
        },
        frozenset(Tcav.writes),
    ),
    Case(
        MeanDifferenceDirection,
        {"layers": ("0", "1"), "concept": above_zero, "folds": 3},
        {"concept": None},
        {"folds": [1], "concept": [(0,)]},
        DIRECTIONS,
    ),
    Case(
        GradientDirection,
        {"layers": ("0", "1"), "concept": above_zero, "folds": 3},
        {"ridge": 0.1},
        {"folds": [1], "steps": [0], "lr": [0.0, float("nan")], "ridge": [0.0, float("inf")]},
        DIRECTIONS,
    ),
    Case(
        IcaDirection,
        {"layers": ("0", "1"), "concept": above_zero, "folds": 3},
        {"components": 2},
        {"folds": [1], "components": [0], "max_steps": [0]},
        DIRECTIONS,
    ),
    Case(
        Cav,
        {"layers": ("0", "1"), "concept": above_zero, "folds": 3, "nulls": 5},
        {"cav": "mean-difference"},
        {"folds": [1], "concept": [(0,)], "cav": ["means"], "C": [0.0, float("nan")], "nulls": [-1]},
        DIRECTIONS | {"null", "p_value", "null_reason"},
    ),
    Case(
        LogisticDirection,
        {"layers": ("0", "1"), "folds": 3},
        {"concept": above_zero},
        {"folds": [1], "concept": [(0,)], "C": [0.0, float("inf"), float("nan")]},
        DIRECTIONS,
    ),
    Case(
        ActivationAddition,
        {"layers": ("0", "1")},
        {"layers": "0"},
        {},
        frozenset({("steer", "0"), ("steer", "1")}),
    ),
    Case(
        Ablate,
        {"layers": ("0", "1"), "units": (0, 2), "to": (0.5, -1.0)},
        {"to": 0.0},
        {"units": [(), (-1,), (0.5,)], "to": ["mean", (None,)]},
        frozenset(),
    ),
    Case(
        DirectionEdit,
        {"layers": ("0", "1"), "direction": (3.0, 0.0, 4.0, 0.0, 0.0), "by": "set", "amount": 2.0},
        {"by": "project_out", "amount": None},
        {
            "direction": [(), (0.0, 0.0), (1.0, float("nan")), {"0": (0.0,)}, {}, ((1.0,), (2.0,)), "0"],
            "by": ["remove"],
            "amount": [None, float("inf")],
        },
        frozenset(),
    ),
    Case(
        Leace,
        {"layers": ("0", "1"), "concept": [above_zero, "late"]},
        {"concept": "y"},
        {"concept": [None, (0,)]},
        frozenset({*((what, layer) for what in ("projection", "bias") for layer in "01"), "rank", "removed", "reason"}),
    ),
    Case(
        Erase,
        {
            "layers": ("0", "1"),
            "erasers": dict.fromkeys(("0", "1", "inner.0", "inner.1"), FIVE),
        },
        {"erasers": {"0": [[3.0] * 5], "1": [[3.0] * 5]}},
        {"erasers": [(), {}, {"0": (1.0,)}, {"0": ((1.0,), (1.0,))}, [[1.0]], {"0": [[float("nan")]]}]},
        frozenset(),
    ),
    Case(
        ActivationCache,
        {"layers": ("0", "1"), "rows": 5},
        {"rows": None},
        {"rows": [0]},
        frozenset({("activation", "0"), ("activation", "1")}),
    ),
    Case(
        SteeringVectors,
        {"layers": ("0", "1"), "steer_fn": double},
        {"layers": "0"},
        {"steer_fn": [None, 3.0]},
        frozenset(),
    ),
    Case(
        LogisticProbe,
        {
            "layers": ("0", "1"),
            "target": {"x": above_zero, "late": "late"},
            "folds": 3,
            "shifts": 5,
            "directions": True,
        },
        {"C": 10.0},
        {"folds": [1], "C": [0.0, -1.0, float("inf"), float("nan")], "shifts": [-1], "target": [(0,)]},
        frozenset(LogisticProbe.writes),
    ),
    Case(
        BilinearProbe,
        {"layers": ("0", "1"), "target": {"x": ("input", 0), "y": "y"}, "folds": 3, "shifts": 5},
        {"right": "1"},
        {
            "folds": [1],
            "shifts": [-1],
            "target": [(0,)],
            "alphas": [(), (0.0,), (float("nan"),)],
            "rank": [0],
            "right": [("0", "1")],
        },
        frozenset(BilinearProbe.writes),
    ),
    Case(
        MeanDifferenceProbe,
        {
            "layers": ("0", "1"),
            "target": {"x": above_zero, "late": "late"},
            "folds": 3,
            "shifts": 5,
            "directions": True,
        },
        {"folds": 4},
        {"folds": [1], "shifts": [-1], "target": [(0,)]},
        frozenset(MeanDifferenceProbe.writes),
    ),
    Case(
        RidgeProbe,
        {"layers": ("0", "1"), "target": {"x": ("input", 0), "y": "y"}, "folds": 3, "shifts": 19, "directions": True},
        {"alphas": (1.0, 10.0)},
        {"folds": [1], "alphas": [(), (0.0,), (-1.0,)], "shifts": [-1], "target": [(0,)]},
        frozenset(RidgeProbe.writes),
    ),
    Case(
        SklearnProbe,
        {
            "layers": ("0", "1"),
            "target": {"x": above_zero, "late": "late"},
            "folds": 3,
            "shifts": 2,
            "estimator": make_pipeline(StandardScaler(), RandomForestClassifier(2)),
        },
        {"estimator": make_pipeline(StandardScaler(), RandomForestClassifier(3))},
        {
            "folds": [1],
            "shifts": [-1],
            "target": [(0,)],
            "estimator": [None, LinearRegression, KMeans(), LinearSVC(random_state=np.random.RandomState(0))],
        },
        frozenset(key for key in SklearnProbe.writes if key != "p" and not key.startswith("r2")),
    ),
    Case(
        ControlTask,
        {"of": LogisticProbe(target={"x": above_zero, "late": "late"}, folds=3, shifts=0), "types": nearest},
        {"seed": 1},
        {"of": [None, DeadUnits()], "types": [["late", "y"], {"a": "y"}, (0,)]},
        frozenset(LogisticProbe.writes) - {"direction", "intercept"}
        | {"balanced_accuracy_control", "selectivity", "reason_control"},
    ),
    Case(
        MdlProbe,
        {"layers": ("0", "1"), "target": {"x": above_zero, "late": "late"}},
        {"seed": 1},
        {
            "portions": [(), (100.0,), (50.0, 25.0, 100.0), (50.0, 90.0), (0.0, 100.0), (float("nan"), 100.0)],
            "C": [0.0, float("nan")],
            "target": [(0,)],
        },
        frozenset(MdlProbe.writes),
    ),
    Case(
        ProbeTransfer,
        {"of": LogisticProbe(target={"x": above_zero, "late": "late"}, folds=3), "rows": 30},
        {"rows": None},
        {"of": [None, DeadUnits()], "rows": [0]},
        frozenset(ProbeTransfer.writes) - {"activation"} | {("activation", layer) for layer in "012"},
    ),
    Case(
        ActivationPatching,
        {"layers": ("0", "1"), "targets": ("output", 1), "pairs": 6, "way": "both"},
        {"pairs": 4},
        PAIRED_NOT | {"by": ["median", "mean"], "counterfactual": ["late"], "decision": ["output"]},
        frozenset(f"{key}{way}" for key in PATCHED - {"gap"} for way in ("", "_denoise")) | {"gap"},
    ),
    Case(
        AttributionPatching,
        {"layers": ("0", "1"), "targets": ("output", 1), "pairs": 6},
        {"sample": 4},
        PAIRED_NOT | {"sample": [-1], "verify": [-1]},
        PATCHED | AGREEMENT,
    ),
    Case(
        RelP,
        {"layers": ("0", "1"), "targets": ("output", 1), "pairs": 6},
        {"attention": "gradient"},
        PAIRED_NOT | {"sample": [-1], "verify": [-1], "attention": ["softmax", None]},
        PATCHED | AGREEMENT,
    ),
    Case(
        AtPStar,
        {"layers": ("0", "1"), "targets": ("output", 1), "pairs": 6, "blocks": ("**.0", "**.2")},
        {"blocks": (("0", "1"), "2")},
        PAIRED_NOT | {"sample": [-1], "blocks": ["0", ("0",)], "query": ["0"], "weights": ["0"], "scale": [1.0]},
        PATCHED | AGREEMENT,
    ),
    Case(
        PathPatching,
        {"layers": ("0", "1"), "targets": ("output", 1), "pairs": 6, "receivers": "**.2"},
        {"frozen": ()},
        PAIRED_NOT,
        PATCHED,
    ),
    Case(
        DormantUnits,
        {"layers": ("0", "1"), "taus": (0.0, 0.1)},
        {"taus": (0.5,)},
        {"taus": [(), (-0.1,)]},
        frozenset(DormantUnits.writes),
    ),
    Case(
        DeadUnits,
        {"layers": ("0", "1"), "min_std": 1e-2},
        {"min_std": 1e-4},
        {"min_std": [-1.0]},
        frozenset(DeadUnits.writes),
    ),
    Case(ReDo, {"layers": ("0", "1"), "tau": 0.5}, {"tau": 0.0}, {"tau": [-0.1, float("nan")]}, frozenset(ReDo.writes)),
    Case(
        AblatedReturn,
        {"make_env": Answering, "layers": ("0", "1"), "units": "each", "by": "mean", "episodes": 3},
        {"by": "zero"},
        {
            "make_env": [None, Answering()],
            "units": ["all", (-1,), (0.5,)],
            "by": ["median"],
            "episodes": [0],
            "max_steps": [0],
            "exploration": ["mode"],
        },
        frozenset(AblatedReturn.writes),
    ),
    Case(
        Cka,
        {"layers": ("0", "1"), "to": ("initial", "previous", "layers"), "rows": 20},
        {"to": "initial"},
        {"to": ["before", ()], "rows": [3], "reference": [3, {}]},
        frozenset(
            [f"{what}_{to}" for what in ("cka", "reason") for to in ("initial", "previous", "layers")]
            + ["few_rows", "inputs", ("activation", "0"), ("activation", "1")]
        ),
    ),
    Case(
        GradientCovariance,
        {"targets": [("output", 0), ("output", 1)], "layers": ("0", "2"), "rows": 6},
        {"max_bytes": 100},
        {"rows": [0], "max_bytes": [0], "targets": [[(0,)]]},
        frozenset(GradientCovariance.writes),
    ),
    Case(
        GradientNorms,
        {"targets": [("output", 0), ("output", 1)], "layers": ("0", "2"), "rows": 6},
        {"rows": 5},
        {"rows": [0], "targets": [[(0,)]]},
        frozenset({*GradientNorms.writes, ("gradient", "0"), ("gradient", "2")} - {"gradient"}),
    ),
    Case(
        TargetFitPlasticity,
        {"draws": 2, "steps": 2, "rows": 10},
        {"lr": 0.1},
        {
            "draws": [0],
            "steps": [0],
            "rows": [0],
            "lr": [0.0, float("nan"), float("inf")],
            "fresh": ["new"],
            "output": [(0,), above_zero],
        },
        frozenset(TargetFitPlasticity.writes),
    ),
    Case(
        ValueCalibration,
        {"values": ("output", 0), "returns": "y"},
        {"values": ("output", 1)},
        {"values": [(0,)], "returns": [(0,)]},
        frozenset(ValueCalibration.writes),
    ),
    Case(
        WeightDistance,
        {"layers": ("0", "2"), "to": ("initial", "previous")},
        {"to": "initial"},
        {"to": ["before", ()]},
        frozenset(
            (
                *(f"{what}_{to}" for what in ("l2", "relative", "cosine") for to in ("initial", "previous")),
                *("norm", ("parameters", "0"), ("parameters", "2")),
            )
        ),
    ),
    Case(EffectiveRank, {"layers": ("0", "1")}, {"layers": "0"}, {}, frozenset(EffectiveRank.writes)),
    Case(
        Churn,
        {"logits": "output", "values": ("output", 0), "rows": 6},
        {"rows": 5},
        {"rows": [0], "loc": ["loc"], "logits": [(0,)]},
        frozenset({*Churn.writes, ("churn_outputs", "logits"), ("churn_outputs", "values")} - {"churn_outputs"}),
    ),
    Case(StableRank, {"layers": ("0", "1")}, {"layers": "0"}, {}, frozenset(StableRank.writes)),
    Case(
        SRank,
        {"layers": ("0", "1")},
        {"delta": 0.1},
        {"delta": [0.0, 1.0, float("nan")]},
        frozenset(SRank.writes),
    ),
    Case(
        FeatureRank,
        {"layers": ("0", "1")},
        {"epsilon": 0.1},
        {"epsilon": [0.0, -1.0, float("nan")]},
        frozenset(FeatureRank.writes),
    ),
    Case(
        AttentionPatterns,
        {"rows": 4},
        {"reduction": "mean"},
        {"rows": [0], "reduction": ["sum"]},
        frozenset({("attention", "1.heads")}),
        Attending,
    ),
    Case(
        AttentionRollout,
        {"rows": 4},
        {"fusion": "max"},
        {"rows": [0], "reduction": ["sum"], "fusion": ["sum"]},
        frozenset({"rollout"}),
        Attending,
    ),
    Case(
        LogitLens,
        {"layers": ("0", "1"), "head": "2"},
        {"output_is": "values"},
        {"layers": [None], "head": [None, "", 3], "output_is": ["value"], "rows": [1]},
        frozenset({"lens", "kl", "agreement", "reason"}),
    ),
    Case(
        TunedLens,
        {"layers": ("0", "1"), "head": "2", "folds": 2, "steps": 5},
        {"penalty": 1.0},
        {"head": [None], "output_is": ["value"], "folds": [1], "penalty": [0.0, float("inf")], "steps": [0]},
        frozenset({"lens", "kl", "agreement", "kl_untuned", "agreement_untuned", "converged", "reason"}),
    ),
    Case(
        MaxActivating,
        {"layers": ("0", "1"), "k": 3},
        {"inputs": 1},
        {"k": [0], "inputs": [-1, 4]},
        frozenset({*MaxActivating.writes, ("top", "input")} - {"top"}),
    ),
)


def mlp(*widths, activation=nn.Tanh):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def batch(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y, plus, minus = (torch.randn(n, *width, generator=g) for width in ((3,), (), (3,), (3,)))
    late = torch.arange(n) % 3
    return TensorDict(
        {"input": x, "y": y, "late": late, ("positive", "input"): plus, ("negative", "input"): minus}, [n]
    )


def measured(method, model, td, **known):
    """The artifacts of one method on one model, by hand."""
    in_keys, out_keys = known.pop("in_keys", None), known.pop("out_keys", None)
    with method.prepare(model, in_keys, out_keys) as hooked:
        return hooked(td, **known)
