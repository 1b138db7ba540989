"""Dormant units, started anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdhook_train.edit import Rewrite, Rewritten
from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.readers import sole_readers
from tdhook_train.isolation import private_copy
from tdhook_train.method import Seen, look
from tdhook_train.ops.join import Labels
from tdhook_train.ops.units import dormancy, padded

__all__ = ["ReDo"]

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class _Layer:
    """A layer whose units can start anew: made by one module, read by one other, through activations alone."""

    made_by: str
    site: str  # where its units are active: after the last activation
    read_by: str


@dataclass(frozen=True)
class ReDo(Rewrite):
    """Recycling dormant neurons: units that hardly respond get new incoming weights, and outgoing ones of zero.

    A unit is dormant as :class:`~tdhook_train.health.DormantUnits` says, on what its layer gives out after its
    activation. Incoming weights and bias are drawn by the layer's own ``reset_parameters``; what the optimizer keeps
    of every weight that is written (Adam's moments) becomes zero. A unit that never responds can be recycled without
    changing any output. Costs one forward pass of its own, and a small one the
    first time.

    Layers are those that one linear layer or convolution makes and one other reads, with nothing between but
    parameter-free modules that keep the number of values (activations, flattening). Others, the last one among them,
    are left alone.

    Args:
        layers: paths, patterns, module classes or predicates of the modules that make them, or of their activations.
        tau: threshold of the score.

    Writes:
        ``reset`` [layer, unit]: 1 where the unit is dormant, NaN beyond the layer's width. ``dormancy`` [layer, unit]:
        its score.

    Source: Sokar et al. 2023, arXiv:2302.12902, algorithm 1.
    """

    layers: Selection = "**"
    tau: float = 0.1

    writes: ClassVar[Mapping[str, str]] = {"reset": "layer unit", "dormancy": "layer unit"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau >= 0:
            raise SettingsError(f"ReDo needs a threshold of 0 or more, got tau={self.tau}")

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The modules that make the units."""
        made_by = [layer.made_by for layer in self._layers(seen, model)]
        return {"layer": list(made_by), "layer_type": [model.kind(site) for site in made_by]}

    def concerns(self, model: HookedModel) -> bool:
        """Whether a layer is named that weights make."""
        return super().concerns(model) and any(isinstance(m, _WEIGHTED) for m in model.module.modules())

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Score the units of every layer that can be recycled."""
        scores = self._scores(seen, model)
        if not scores:
            return TensorDict({key: torch.zeros(0, 0) for key in self.writes}, batch_size=[])
        found = padded(scores)
        reset = torch.where(found.isnan(), found, (found <= self.tau).to(found.dtype))
        return TensorDict({"reset": reset, "dormancy": found}, batch_size=[])

    def rewritten(self, seen: Seen, model: HookedModel) -> dict[str, Rewritten]:
        """Draw new weights for the dormant units of every layer, and clear the outgoing ones."""
        if seen.generator is None:
            raise SettingsError("ReDo draws weights and needs a generator: hooked(td, generator=torch.Generator())")
        new = _Parameters(model)
        dormant = [score <= self.tau for score in self._scores(seen, model)]
        layers = list(zip(self._layers(seen, model), dormant, strict=True))
        for layer, units in layers:
            new.draw(layer.made_by, units, seen.generator)
        for layer, units in layers:  # afterwards: nor does a new unit listen to another one
            new.clear(layer.read_by, units)
        return new.written

    def _scores(self, seen: Seen, model: HookedModel) -> list[Tensor]:
        layers = self._layers(seen, model)
        values = look(model, seen.batch, [site for layer in layers for site in (layer.made_by, layer.site)])[0]
        scores = []
        for layer in layers:
            made = values[layer.made_by]
            active = values[layer.site].reshape(made.shape)  # flattened or not, the values stand in one order
            scores.append(dormancy(active, model.unit_axis(layer.made_by, made)))
        return scores

    def _layers(self, seen: Seen, model: HookedModel) -> list[_Layer]:
        known = ("layers", model.name)
        if known not in seen.memo:
            seen.memo[known] = _recyclable(model, seen.batch[:2], set(model.sites(self.layers)))
        return seen.memo[known]


def _recyclable(model: HookedModel, inputs: TensorDictBase, chosen: set[str]) -> list[_Layer]:
    """Find the layers whose units one module makes and one other reads, some site on the way being chosen."""
    sites = model.sites("**")
    values = look(model, inputs, sites)[0]
    readers = sole_readers(model, inputs, sites)
    found = []
    for made_by in sites:
        maker, chain = model.module_of(made_by), [made_by]
        while (reader := readers.get(chain[-1])) and _passes_on(
            model.module_of(reader), values[reader], values[made_by]
        ):
            chain.append(reader)
        if reader is not None and chosen & {*chain}:
            weight, read_by = _own_weight(maker), _own_weight(model.module_of(reader))
            if weight is not None and read_by is not None and read_by.shape[1] % weight.shape[0] == 0:
                found.append(_Layer(made_by, chain[-1], reader))
    return found


def _own_weight(module: nn.Module) -> Tensor | None:
    # not one that is computed from others, as by spectral norm, nor one that lies elsewhere, as those of agents
    return module._parameters.get("weight") if isinstance(module, _WEIGHTED) else None


def _passes_on(module: nn.Module, value: Tensor, made: Tensor) -> bool:
    return next(module.parameters(), None) is None and value.numel() == made.numel()


class _DrawnFrom(TorchFunctionMode):
    """Lets what draws in place draw from a generator, rather than from that of the process."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # a tensor's, or one of torch.nn.init, whose own calls do not come by here
        if func in (Tensor.uniform_, Tensor.normal_) or "generator" in getattr(func, "__annotations__", {}):
            kwargs["generator"] = kwargs.get("generator") or self._generator
        return func(*args, **kwargs)


class _Parameters:
    """New values of some entries of a model's parameters."""

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self.written: dict[str, Rewritten] = {}

    def draw(self, site: str, units: Tensor, generator: torch.Generator) -> None:
        """Draw the weights that go into some units as the layer does when it is made."""
        fresh = private_copy(self._model.module_of(site)).cpu()
        with _DrawnFrom(generator):
            cast(Any, fresh).reset_parameters()
        for name, value in fresh.named_parameters():
            self._write(f"{site}.{name}", value.detach().to(units.device), units.view(-1, *[1] * (value.ndim - 1)))

    def clear(self, site: str, units: Tensor) -> None:
        """Set the weights that read some units to zero."""
        weight = cast(Tensor, self._model.module_of(site).weight)
        read = units.repeat_interleave(weight.shape[1] // len(units))  # a flattened channel is read in many places
        self._write(f"{site}.weight", torch.zeros_like(weight), read.view(1, -1, *[1] * (weight.ndim - 2)))

    def _write(self, name: str, value: Tensor, where: Tensor) -> None:
        if not where.any():
            return
        where, before = where.expand_as(value), self.written.get(name)
        if before is not None:
            value, where = torch.where(where, value, before.value), where | before.where
        self.written[name] = Rewritten(value.clone(), where.clone())
