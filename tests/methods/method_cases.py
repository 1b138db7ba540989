"""One row a public method: its settings, others that differ, some that are refused, and the keys it writes."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from method_env import Answering
from tensordict import TensorDict
from torch import nn

from tdhook_train import Method, attribution, health, latent, weights
from tdhook_train.attribution import (
    ConceptAttribution,
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    Saliency,
    Tcav,
)
from tdhook_train.health import DeadUnits, DormantUnits, EffectiveRank, ReDo
from tdhook_train.latent import (
    Ablate,
    ActivationAddition,
    ActivationCache,
    ActivationPatching,
    Cka,
    LogisticProbe,
    RidgeProbe,
    SteeringVectors,
)
from tdhook_train.rl import AblatedReturn
from tdhook_train.weights import WeightDistance

PUBLIC = [getattr(family, name) for family in (attribution, health, latent, weights) for name in family.__all__]
PUBLIC += [AblatedReturn]  # outside the families, since it needs TorchRL


@dataclass(frozen=True)
class Case:
    make: type[Method]
    settings: dict[str, Any]
    other: dict[str, Any]
    refused: dict[str, list[Any]]
    keys: frozenset[Any]

    def method(self):
        return self.make(**self.settings)


def double(_layer, output):
    return output * 2


def above_zero(td):
    return td["input"][:, 0] > 0


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
        InputXGradient,
        {"targets": [("output", 0), ("output", 1)], "rows": 6},
        {"rows": 5},
        {"rows": [0], "max_bytes": [0], "side": ["inputs"], "reduction": ["sum"], "targets": [(0,)]},
        frozenset({("attr", "input")}),
    ),
    Case(
        Saliency,
        {"targets": [("output", 0), ("output", 1)], "rows": 6},
        {"score": "absolute"},
        {"rows": [0], "score": ["abs"], "targets": [(0,)]},
        frozenset({("attr", "input")}),
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
        {"layers": ("0", "1"), "target": {"x": above_zero, "late": "late"}, "folds": 3, "shifts": 5},
        {"C": 10.0},
        {"folds": [1], "C": [0.0, -1.0, float("inf"), float("nan")], "shifts": [-1], "target": [(0,)]},
        frozenset(LogisticProbe.writes),
    ),
    Case(
        RidgeProbe,
        {"layers": ("0", "1"), "target": {"x": ("input", 0), "y": "y"}, "folds": 3, "shifts": 19, "directions": True},
        {"alphas": (1.0, 10.0)},
        {"folds": [1], "alphas": [(), (0.0,), (-1.0,)], "shifts": [-1], "target": [(0,)]},
        frozenset(RidgeProbe.writes),
    ),
    Case(
        ActivationPatching,
        {"layers": ("0", "1"), "targets": ("output", 1), "pairs": 6},
        {"pairs": 4},
        {"pairs": [1], "targets": [(0,)]},
        frozenset(ActivationPatching.writes),
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
