"""Patching to first order, with its measured agreement with exact patching."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain import Problem
from tdhook_train.hooks import HookedModel
from tdhook_train.latent.paired import Changes, Paired, States
from tdhook_train.method import Seen
from tdhook_train.ops.units import evenly_spaced

__all__ = ["GradientPatching"]

_TOP = ("top_layer", "top_part", "top_estimate", "top_exact")


@dataclass(frozen=True)
class GradientPatching(Paired):
    """Effects of all patches at once, estimated as a slope times the change of the activation.

    An estimate is worth what its agreement with exact patching says: both are taken on some parts, of the last kind of
    ``parts``.

    Args:
        sample: how many parts of each layer, evenly spaced, are patched exactly as well; 0 for none.
        verify: how many of the largest estimates of a network are patched exactly as well; 0 for none.
    """

    _: KW_ONLY
    sample: int = 32
    verify: int = 8

    writes: ClassVar[Mapping[str, str]] = {
        **Paired.writes,
        **{f"agreement{way}": "layer target" for way in ("", "_denoise")},
        **{f"agreement_overall{way}": "target" for way in ("", "_denoise")},
        **{f"{name}{way}": "rank target" for name in _TOP for way in ("", "_denoise")},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample < 0 or self.verify < 0:
            name = type(self).__name__
            raise SettingsError(f"{name} needs sample and verify of 0 or more, got {self.sample} and {self.verify}")

    @abstractmethod
    def slopes(self, problem: Problem, states: States) -> Mapping[str, Tensor]:
        """Return the slope of each metric at each site of the base: ``[target, *shape]`` of the site's value."""

    def changes(self, states: States, model: HookedModel, seen: Seen) -> Changes:  # noqa: ARG002 - the same whatever is seen
        """Multiply slopes by the change of the activations, and add up over each part."""
        slopes = self.slopes(self.problem(states, model), states)
        return {site: self.by_part(states, model, site, slopes[site]) for site in states.before}

    def by_part(self, states: States, model: HookedModel, site: str, slope: Tensor) -> dict:
        """Add up slope times change over each part of one site: ``[part, pair, target]`` by kind."""
        axis, moved = self.row_axis(model, site), states.after[site] - states.before[site]
        return {
            kind: torch.stack([one.sums(along * moved, axis) for along in slope], -1)
            for kind, one in self.cuts(states, model, site).items()
        }

    def problem(self, states: States, model: HookedModel) -> Problem:
        """Return the metrics of the base as a function of the values at the sites."""
        still = dict(states.base.items(include_nested=True, leaves_only=True))
        return Problem(
            model,
            lambda outputs, inputs: dict(self.columns(outputs.select(*model.out_keys, strict=False), inputs, model)),
            tuple(self.columns(states.outputs, states.base, model)),
            self.side,
            dict(states.before),
            still,
            torch.zeros(len(states.base), dtype=torch.int64),
            len(states.base),
        )

    # ------------------------------------------------------------------ what it is worth

    def further(self, changes: Changes, states: States, model: HookedModel) -> dict[str, Tensor]:
        """Hold estimates against exact patching."""
        found = self._agreement(changes, states, model) if self.sample else {}
        return found | (self._largest(changes, states, model) if self.verify else {})

    def _agreement(self, changes: Changes, states: States, model: HookedModel) -> dict[str, Tensor]:
        kind, pairs = self.parts[-1], []
        for site, found in changes.items():
            index = evenly_spaced(len(found[kind]), self.sample)
            pairs.append(torch.stack([found[kind][index], self._exactly(states, model, site, index)]).flatten(1, 2))
        each = torch.stack([_correlation(*pair) for pair in pairs])
        return {"agreement": each, "agreement_overall": _correlation(*torch.cat(pairs, 1))}

    def _largest(self, changes: Changes, states: States, model: HookedModel) -> dict[str, Tensor]:
        kind = self.parts[-1]
        effects = [found[kind].abs().mean(1) for found in changes.values()]  # [part, target] a site
        layer = torch.cat([torch.full((len(effect),), i) for i, effect in enumerate(effects)])
        part = torch.cat([torch.arange(len(effect)) for effect in effects])
        every = torch.cat(effects).nan_to_num(-torch.inf)
        top = every.topk(min(self.verify, len(every)), 0).indices.cpu()  # [rank, target]
        exact = torch.full(every.shape, torch.nan, dtype=every.dtype, device=every.device)
        for i, site in enumerate(changes):
            wanted = top[layer[top] == i].unique()
            if len(wanted):
                exact[wanted] = self._exactly(states, model, site, part[wanted]).abs().mean(1)
        estimate = torch.cat(effects).gather(0, top.to(every.device))
        return dict(zip(_TOP, (layer[top], part[top], estimate, exact.gather(0, top.to(every.device))), strict=True))

    def _exactly(self, states: States, model: HookedModel, site: str, index: Tensor) -> Tensor:
        one = self.cuts(states, model, site)[self.parts[-1]]
        return self.exact(states, model, site, [(one, index)])


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of columns ``[n, target]``, NaN where one does not vary."""
    a, b = (value.double() - value.double().mean(0) for value in (a, b))
    size = a.square().sum(0).sqrt() * b.square().sum(0).sqrt()
    return (a * b).sum(0) / size
