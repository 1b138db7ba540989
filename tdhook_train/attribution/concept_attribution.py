"""What of an output flows through a concept, or what the concept itself rests on: any attribution, conditioned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import NetworkError, SettingsError
from tdhook_train.explain import Attribution, Perturbed
from tdhook_train.explain.attribution import one_of
from tdhook_train.explain.concept import CAVS, Through, along, directions, given, labelled
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of
from tdhook_train.method import Method, Seen
from tdhook_train.ops.directions import over_positions
from tdhook_train.ops.join import Labels
from tdhook_train.ops.targets import named

__all__ = ["ConceptAttribution"]

_EXPLAINED = ("outputs", "concept")


@dataclass(frozen=True)
class ConceptAttribution(Method):
    """Which inputs an output rests on by way of a concept: a direction among the units of a layer (a CAV).

    At the layer, of all that comes back from the output only the gradient along the direction goes on to the inputs
    (at every position of an image or a sequence). Over an orthonormal basis of directions the shares add up to those
    of the attribution alone. What passes beside the layer, in a residual connection say, goes on as it is: choose a
    layer that everything goes through.

    Costs what the attribution costs, and for a regression its fit.

    Args:
        attribution: whose gradients are conditioned: :class:`Saliency`, :class:`InputXGradient`,
            :class:`IntegratedGradients` (the conductance of the direction) or another that differentiates.
        at: the layer.
        direction: a number for each unit of the layer, of any length but 0. Where neither it nor ``concept`` is given,
            it stands in the batch, the same for every row: ``("concept", at)`` [batch, unit].
        concept: which rows show the concept: a boolean key of the batch, one feature of a key, or a function of it.
        cav: how the direction is found from these: the difference of the means, or the normal of a logistic regression
            (of activations that are averaged over positions).
        C: weight of the summed log-loss of the regression against ½‖w‖².
        explains: the attribution's targets; or the activation along the direction (averaged over positions), which any
            method can explain, perturbations as well.

    Writes:
        ``("attr", key)`` as the attribution does, in units of the target; for the concept without a target dimension.
        ``("direction", at)`` [unit], of length 1.

    Source: Kim et al. 2018, arXiv:1711.11279 (directions); Pahde et al. 2022, arXiv:2202.03482 (differences of means);
    TDHook, arXiv:2509.25475, section 4 (propagation).
    """

    attribution: Attribution
    at: str
    direction: Sequence[float] | None = None
    concept: Any = None
    cav: Literal["mean-difference", "logistic"] = "mean-difference"
    C: float = 1.0
    explains: Literal["outputs", "concept"] = "outputs"

    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature", "direction": "unit"}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, cav=CAVS, explains=_EXPLAINED)
        if not isinstance(self.attribution, Attribution):
            raise SettingsError(f"ConceptAttribution needs an attribution, got {self.attribution!r}")
        if self.explains == "outputs" and isinstance(self.attribution, Perturbed):
            raise SettingsError(
                "ConceptAttribution needs a method that differentiates; "
                f"{type(self.attribution).__name__} can only explain the concept itself, explains='concept'"
            )
        if self.explains == "concept" and (self.attribution.targets or self.attribution.init_attr_targets):
            raise SettingsError("ConceptAttribution with explains='concept' needs a method without targets")
        if self.direction is not None and self.concept is not None:
            raise SettingsError("ConceptAttribution needs direction or concept, not both")
        if self.concept is not None:
            named(self.concept)
        if not self.C > 0 or float("inf") == self.C:
            raise SettingsError(f"ConceptAttribution needs C above 0, got {self.C}")
        if self.direction is not None:  # lists and tensors are welcome, but settings compare and hash as tuples
            object.__setattr__(self, "direction", tuple(float(x) for x in self.direction))

    def taps(self, model: HookedModel) -> Sequence[str]:
        """Read the layer, and what the method reads."""
        return list(dict.fromkeys([*model.sites(self.at), *self._conditioned().taps(model)]))

    def check(self, models: Mapping[str, HookedModel]) -> None:
        """Refuse what the method refuses, and a layer that no network has."""
        chosen = self.chosen(models)
        self.attribution.check(chosen)
        replace(self.attribution, layers=self.at).check(chosen)

    def concerns(self, model: HookedModel) -> bool:
        """Whether this network has the layer, and the method something to say of it."""
        return self.attribution.concerns(model) and bool(model.sites(self.at))

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Explain with the direction in the way of the gradients."""
        at, value, axis = self._layer(seen, model)
        through = Through(self._direction(seen, value, axis), axis)
        method = self._conditioned(lambda _outputs: along(_value(through), through.direction, axis))
        through.value = value
        with model.edited({at: through}):
            found = method.measure(seen, model)
        if self.explains == "outputs" and not through.passed:
            raise NetworkError(
                f"ConceptAttribution: no gradient of {type(method).__name__} came through {at!r}; choose a layer "
                "between what is explained and what it is explained by"
            )
        leaves = found.items(include_nested=True, leaves_only=True)
        kept = {key: leaf for key, leaf in leaves if path_of(key)[0] == "attr"}
        return TensorDict({**kept, ("direction", *path_of(at)): through.direction}, batch_size=[])

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Name the dimensions as the method does."""
        return super().dims(key, ndim) if path_of(key)[0] == "direction" else self._conditioned().dims(key, ndim)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Label as the method does."""
        return self._conditioned().labels(seen, model)

    def _conditioned(self, target: Callable[[TensorDictBase], Tensor] | None = None) -> Attribution:
        """Return the method, with the concept as its target where that is explained."""
        return self.attribution if self.explains == "outputs" else replace(self.attribution, targets=target or _concept)

    def _layer(self, seen: Seen, model: HookedModel) -> tuple[str, Tensor, int]:
        sites = model.sites(self.at)
        if len(sites) != 1:
            raise NetworkError(f"ConceptAttribution goes through one layer; at={self.at!r} names {len(sites)}: {sites}")
        value = seen.values[sites[0]]
        if len(value) != len(seen.batch) or not value.is_floating_point() or value.ndim < 2:
            raise NetworkError(
                f"ConceptAttribution goes through units of each of {len(seen.batch)} rows; {sites[0]!r} gives out "
                f"{value.dtype}, {list(value.shape)}"
            )
        return sites[0], value, model.unit_axis(sites[0], value)

    def _direction(self, seen: Seen, value: Tensor, axis: int) -> Tensor:
        width = value.shape[axis]
        if self.concept is not None:
            marks = labelled(seen.batch, self.concept, value.device)
            return directions(over_positions(value, axis), marks[:, None], self.cav, self.C)[0].to(value)
        if self.direction is not None:
            return given(self.direction, width, self.at).to(value)
        rows = seen.batch.get(("concept", *path_of(self.at)), None)
        if rows is None:
            raise SettingsError(
                f"ConceptAttribution needs direction, concept, or a direction in the batch: ('concept', {self.at!r})"
            )
        if (rows != rows[:1]).any():
            raise SettingsError(f"('concept', {self.at!r}) needs the same direction in every row of the batch")
        return given(rows[0], width, self.at).to(value)


def _concept(_outputs: TensorDictBase) -> Tensor:
    """Stand for the target where only its name and number count."""
    return torch.empty(0)


def _value(through: Through) -> Tensor:
    assert through.value is not None
    return through.value
