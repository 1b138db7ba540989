"""The way back of each module of a network: its rule, with normalisations merged and conditions kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from tdhook_train.attribution.relevance.affine import AFFINE, NORMALISED, Affine, merged_by
from tdhook_train.attribution.relevance.composites import Composite
from tdhook_train.attribution.relevance.rules import Pass, RelevanceRule, Shares, Term, shared
from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel
from tdhook_train.hooks.reroute import Passed, Rule

__all__ = ["Keep", "ways_of"]

Keep = Callable[[Tensor, Tensor], Tensor]
"""What of the relevance of a value goes on."""

_Merged = dict[int, tuple[Passed, nn.Module, tuple[Tensor, Tensor]]]


@dataclass
class _Way:
    """The way back through one module; what does not go by the relevance is worked out once for all targets."""

    rule: RelevanceRule
    merged: _Merged
    layers: dict[nn.Module | None, Affine] = field(default_factory=dict)
    known: dict[int, tuple[Passed, Affine, list[Term]]] = field(default_factory=dict)  # holds calls, so ids stay theirs

    def __call__(self, passed: Passed, relevance: Tensor) -> Tensor:
        if not (isinstance(self.rule, Shares) and isinstance(passed.module, AFFINE)):
            return self.rule.back(passed, relevance)
        if id(passed) not in self.known:
            self.known[id(passed)] = self._terms(self.rule, passed)
        _, layer, terms = self.known[id(passed)]
        return shared(terms, layer, passed.inputs[0], relevance)

    def _terms(self, rule: Shares, passed: Passed) -> tuple[Passed, Affine, list[Term]]:
        _, norm, parts = self.merged.get(id(passed), (passed, None, ()))
        if norm not in self.layers:
            self.layers[norm] = Affine(passed.module, *parts)
        layer = self.layers[norm]
        return passed, layer, rule.terms(layer, passed.inputs[0], layer.preactivation(passed.output))


@dataclass
class _Merge:
    """A batch normalisation: says to the layer before it, whose turn comes next, what to merge."""

    merged: _Merged

    def __call__(self, passed: Passed, relevance: Tensor) -> Tensor:
        before, parts = passed.source, merged_by(passed.module)
        if before is not None and isinstance(before.module, AFFINE) and parts is not None:
            self.merged[id(before)] = (before, passed.module, parts)
        return relevance


def ways_of(composite: Composite, model: HookedModel, keeps: dict[nn.Module, Keep]) -> dict[nn.Module, Rule]:
    """Return the way back of every module that has one.

    Args:
        composite: chooses the rules.
        model: whose modules; needs a trace.
        keeps: what goes on of the relevance that comes to some modules.
    """
    merged: _Merged = {}
    modules = {traced.site.module: traced.module for traced in model.traced}
    chosen = composite.rules(modules)
    for path, module in modules.items():
        if isinstance(chosen.get(module), Shares) and not isinstance(module, AFFINE):
            raise SettingsError(
                f"{type(chosen[module]).__name__} is a rule for linear and convolutional layers; {path!r} of "
                f"{model.title} is {type(module).__name__}"
            )
    ways: dict[nn.Module, Rule] = {}
    for module in modules.values():
        if module in chosen:
            ways[module] = _Way(chosen[module], merged)
        elif isinstance(module, NORMALISED):
            ways[module] = _Merge(merged)
        elif type(module).__name__.endswith(("LayerNorm", "RMSNorm", "GroupNorm")):
            ways[module] = _Way(Pass(), merged)  # also where a forward spells it out
    return {module: _kept(rule, keeps[module]) if module in keeps else rule for module, rule in ways.items()}


def _kept(rule: Rule, keep: Keep) -> Rule:
    return lambda passed, relevance: rule(passed, keep(relevance, passed.output))
