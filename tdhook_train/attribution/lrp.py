"""How much of an output each input feature carries, passed back layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_train.attribution.relevance.composites import COMPOSITES, Composite
from tdhook_train.attribution.relevance.conditions import Condition, conditions
from tdhook_train.attribution.relevance.functions import Functions, way
from tdhook_train.attribution.relevance.ways import Keep, ways_of
from tdhook_train.errors import NetworkError, SettingsError
from tdhook_train.explain import Attribution, Found, Problem
from tdhook_train.explain.attribution import one_of
from tdhook_train.explain.here import gradients_here
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of

__all__ = ["LRP"]


@dataclass(frozen=True)
class LRP(Attribution):
    """Layer-wise relevance propagation: each layer shares the relevance of its outputs among its inputs by a rule.

    It starts with the target itself: an output's value, or of a function of the outputs, output times gradient. Rules
    keep the sum from layer to layer, but for what biases and stabilisers take. A batch normalisation counts as part of
    the linear layer before it; sums and products inside a forward, softmax, attention and normalisations go by the
    rules of :class:`.relevance.functions.Functions`; what has no rule goes by the gradient. Weights are only read.

    One forward pass for all targets and layers, and one backward pass for each target; what rules work out of inputs
    and weights is worked out once for all targets. Of what layers take in (``side="input"``), a pass for each layer.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        composite: which rule stands where: a name, or a :class:`.relevance.Composite`.
        through: by layer, numbers of the units (channels) or a direction in floats: only the relevance that passes
            these goes on.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in units of the target.

    Source: Bach et al. 2015, doi:10.1371/journal.pone.0130140; through units, Achtibat et al. 2022, arXiv:2206.03208;
    of attention, Achtibat et al. 2024, arXiv:2402.05602.
    """

    composite: str | Composite = "epsilon_plus"
    through: Mapping[str, int | Sequence[int] | Sequence[float]] | None = None

    moves: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.composite, Composite):
            one_of(self, composite=tuple(COMPOSITES))
        if self.through is not None:
            if not (isinstance(self.through, Mapping) and self.through):
                raise SettingsError(f"LRP needs through={{layer: units or a direction}}, got {self.through!r}")
            chosen = {layer: one.chosen for layer, one in conditions(self.through).items()}
            object.__setattr__(self, "through", chosen)

    def explain(self, problem: Problem) -> Found:
        """Send the relevance of every target back."""
        model = problem.model
        composite = self.composite if isinstance(self.composite, Composite) else COMPOSITES[self.composite]
        found: Found = {}
        # where values are put into a layer, those of one alone
        alone = [[site] for site in problem.sites] if problem.place == "input" else [problem.sites]
        for sites in alone:
            functions, keeps = Functions(), _keeps(self.through or {}, model)
            ways = ways_of(composite, model, keeps)
            part = replace(
                problem,
                point={site: problem.point[site] for site in sites},
                read=partial(_started, problem.read, model.out_keys, functions),
            )
            with ExitStack() as hooks, functions:
                for module in keeps.keys() - ways.keys():
                    hooks.callback(module.register_forward_hook(partial(_keep, keeps[module])).remove)
                grads = gradients_here(part, ways)
            found |= {("attr", *path_of(site)): value for site, value in grads.items()}
        return found


def _started(
    read: Callable[[TensorDictBase, TensorDictBase], dict[str, Tensor]],
    out_keys: Sequence[Any],
    functions: Functions,
    outputs: TensorDictBase,
    inputs: TensorDictBase,
) -> dict[str, Tensor]:
    """Read targets from outputs at which gradients become relevance: R_i = z_i dF/dz_i."""
    functions.over = True
    outputs, given = outputs.copy(), [path_of(key) for key in out_keys]
    for key in list(outputs.keys(include_nested=True, leaves_only=True)):
        value, path = outputs.get(key), path_of(key)
        ours = any(path[: len(out)] == out for out in given)
        if isinstance(value, Tensor):
            live = ours and value.requires_grad
            still = value.detach()
            outputs.set(key, way(partial(torch.mul, still), value, value) if live else still)
    return read(outputs, inputs.detach())


def _keeps(through: Mapping[str, Any], model: HookedModel) -> dict[nn.Module, Keep]:
    keeps: dict[nn.Module, Keep] = {}
    for layer, condition in conditions(through).items():
        (site,) = model.sites(layer)
        keeps[model.module_of(site)] = partial(_condition, condition, model, site)
    return keeps


def _condition(condition: Condition, model: HookedModel, site: str, relevance: Tensor, value: Tensor) -> Tensor:
    return condition.kept(relevance, value, model.unit_axis(site, value))


def _keep(keep: Keep, module: nn.Module, _args: Any, output: Any) -> Tensor | None:
    if not isinstance(output, Tensor):
        raise NetworkError(f"LRP keeps relevance at modules that give out one tensor, not at {type(module).__name__}")
    if not output.requires_grad:
        return None
    still = output.detach()
    return way(lambda relevance: keep(relevance, still), output, output)
