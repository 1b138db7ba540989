"""Which input an output, or a unit of a layer, likes best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import KeyMissingError, NetworkError, SettingsError, TargetError
from tdhook_train.explain.attribution import one_of
from tdhook_train.explain.problem import Point, seeds_of
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.keys import path_of
from tdhook_train.method import Method, Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.slopes import slopes
from tdhook_train.ops.targets import beside, explained, named

__all__ = ["ActivationMaximisation"]

_AT_ONCE = 32


@dataclass(frozen=True)
class ActivationMaximisation(Method):
    """The input that an output, or a unit of a layer, answers to most, found by gradient ascent.

    ``x ← x + lr · ∂(a(x) - penalty · ‖x‖²)/∂x``, kept within bounds. A local maximum: where it starts matters. A pass
    forward and one back for each step, all targets together. Inputs that are no floating-point numbers stay as they are
    in the first row of the batch.

    Args:
        targets: what is maximised, as in :class:`Attribution`; by default every feature of the first output.
        layers: maximise units of what these layers give out instead; channels by their mean over places.
        units: of each layer; all by default.
        start: zeros, the mean of the batch, or noise of the batch's mean and standard deviation, drawn for each target.
        steps: of gradient ascent.
        lr: length of a step, in units of the input's square by units of the target.
        penalty: weight of the squared length of all inputs together.
        bounds: least and largest value of an input, if any.

    Writes:
        ``("optimum", key)`` [target, *feature] for each floating input key.
        ``activation`` [target]: what was reached, without the penalty.
        ``start`` [target]: what it was before.

    Source: Erhan et al. 2009, Visualizing higher-layer features of a deep network, technical report 1341, Montreal.
    """

    targets: Any = None
    layers: Selection | None = None
    units: tuple[int, ...] | None = None
    start: Literal["zero", "mean", "noise"] = "zero"
    steps: int = 100
    lr: float = 0.1
    penalty: float = 0.0
    bounds: tuple[float, float] | None = None

    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {"optimum": "target *feature", "activation": "target", "start": "target"}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, start=("zero", "mean", "noise"))
        if self.steps < 1:
            raise SettingsError(f"ActivationMaximisation needs steps of 1 or more, got {self.steps}")
        for name, least in (("lr", math.ulp(0.0)), ("penalty", 0.0)):
            if not least <= (given := getattr(self, name)) < math.inf:
                raise SettingsError(f"ActivationMaximisation needs {name} above 0 (penalty: or 0), got {given}")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise SettingsError(f"ActivationMaximisation needs bounds (least, largest), got {self.bounds}")
        if self.targets is not None and self.layers is not None:
            raise SettingsError("ActivationMaximisation takes targets or layers, not both")
        if self.units is not None and (self.layers is None or not self.units or min(self.units) < 0):
            raise SettingsError(f"ActivationMaximisation needs layers for units, and numbers of 0 up; got {self.units}")
        if self.targets is not None:
            named(self.targets)

    def taps(self, model: HookedModel) -> Sequence[str]:
        """Read the layers."""
        return () if self.layers is None else model.sites(self.layers)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The targets; features where there is one input."""
        inputs = list(self._inputs(seen, model))
        known = len(inputs) == 1 and inputs[0] in seen.names
        return {"target": self._names(seen, model)} | ({"feature": list(seen.names[inputs[0]])} if known else {})

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Climb, some targets at a time."""
        count = len(self._names(seen, model))
        start, still = self._start(seen, model, count), self._still(seen, model)
        parts = []
        for which in torch.arange(count).split(_AT_ONCE):
            point = {key: value[which.to(value.device)] for key, value in start.items()}
            parts.append(self._climbed(point, still, which, model))
        return TensorDict({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, batch_size=[])

    # ------------------------------------------------------------------ the way up

    def _climbed(self, point: Point, still: Point, which: Tensor, model: HookedModel) -> dict[NestedKey, Any]:
        rest = {key: value.expand(len(which), *value.shape[1:]) for key, value in still.items()}
        before: Tensor | None = None
        with torch.inference_mode(False), torch.enable_grad():
            for _ in range(self.steps):
                leaves = {key: value.detach().requires_grad_() for key, value in point.items()}
                reached = self._own(leaves, rest, which, model)
                before = reached.detach() if before is None else before
                grads = slopes(reached.sum(), list(leaves.values()))
                steps = zip(leaves.items(), grads, strict=True)
                point = {key: self._stepped(leaf.detach(), grad) for (key, leaf), grad in steps}
            after = self._own(point, rest, which, model).detach()
        found: dict[NestedKey, Any] = {("optimum", *path_of(key)): value for key, value in point.items()}
        return found | {"activation": after, "start": before}

    def _stepped(self, value: Tensor, grad: Tensor) -> Tensor:
        value = value + self.lr * (grad - 2 * self.penalty * value)
        return value if self.bounds is None else value.clamp(*self.bounds)

    def _own(self, point: Point, rest: Point, which: Tensor, model: HookedModel) -> Tensor:
        """Return what each row reached of its own target: ``[row]``."""
        batch = TensorDict({**rest, **point}, batch_size=[len(which)])
        if self.layers is None:
            with model.bent():
                found = dict(explained(model.forward(batch), self.targets, model.out_keys, len(which)))
        else:
            with model.run(batch) as run:
                proxies = {site: run.get(site, detach=False) for site in model.sites(self.layers)}
            found = self._of_units({site: proxy.resolve() for site, proxy in proxies.items()}, len(which), model)
        every = torch.stack(list(found.values()), 1)
        return every[torch.arange(len(which)), which]

    # ------------------------------------------------------------------ what is maximised, from where

    def _names(self, seen: Seen, model: HookedModel) -> list[str]:
        if self.layers is None:
            return list(explained(seen.batch, self.targets, model.out_keys, len(seen.batch)))
        values = {site: seen.values[site] for site in model.sites(self.layers)}
        return list(self._of_units(values, len(seen.batch), model))

    def _of_units(self, values: Mapping[str, Tensor], rows: int, model: HookedModel) -> dict[str, Tensor]:
        """Return the units of layers, ``[row]`` each; channels in the mean over places.

        Raises:
            NetworkError: a layer without rows.
            TargetError: a unit that it does not have.
        """
        found: dict[str, Tensor] = {}
        for site, value in values.items():
            if len(value) != rows or value.ndim < 2:
                raise NetworkError(f"the output of {site!r} is {list(value.shape)}, not units of {rows} rows")
            units = value.movedim(model.unit_axis(site, value), 1)
            units = units.flatten(2).mean(2) if units.ndim > 2 else units
            wanted = range(units.shape[1]) if self.units is None else self.units
            if max(wanted) >= units.shape[1]:
                raise TargetError(f"{site!r} has units 0 to {units.shape[1] - 1}, not {max(wanted)}")
            found |= {f"{site}.{unit}": units[:, unit] for unit in wanted}
        return found

    def _inputs(self, seen: Seen, model: HookedModel) -> Point:
        every = {key: seen.batch.get(key) for key in model.in_keys}
        found = {key: value for key, value in every.items() if value.is_floating_point()}
        if not found:
            kinds = {key: value.dtype for key, value in every.items()}
            raise KeyMissingError(f"ActivationMaximisation needs a floating-point input, {model.title} reads {kinds}")
        return found

    def _start(self, seen: Seen, model: HookedModel, count: int) -> Point:
        """Return where each target starts, ``[target, *feature]``."""
        start: Point = {}
        seeds = seeds_of(seen.generator, count).tolist()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for key, value in self._inputs(seen, model).items():
            mean = value.mean(0) if self.start != "zero" else torch.zeros_like(value[0])
            point = mean.expand(count, *mean.shape).clone()
            if self.start == "noise":
                drawn = [torch.randn(mean.shape, generator=generator, dtype=mean.dtype) for generator in generators]
                point += torch.stack(drawn).to(mean.device) * value.std(0, correction=0)
            start[key] = point if self.bounds is None else point.clamp(*self.bounds)
        return start

    def _still(self, seen: Seen, model: HookedModel) -> Point:
        moved = self._inputs(seen, model)
        still = {key: seen.batch.get(key)[:1] for key in model.in_keys if key not in moved}
        read = beside(seen.batch, self.targets, [*model.in_keys, *model.out_keys])
        return still | {key: value[:1] for key, value in read.items()}
