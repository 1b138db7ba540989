"""Attribution patching without its two blind spots: attention that is saturated, effects that cancel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_train.errors import NetworkError, SettingsError
from tdhook_train.explain import Problem
from tdhook_train.explain.here import gradients_at
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.latent.attribution_patching import AttributionPatching
from tdhook_train.latent.paired import Changes, States
from tdhook_train.method import Seen
from tdhook_train.ops.attention_patterns import Attention, Side, attention_like, in_heads
from tdhook_train.ops.cuts import Part

__all__ = ["AtPStar"]

_ATTENTION = ("query", "key", "value", "joined")
_SIDES: tuple[Side, Side] = ("query", "key")


@dataclass(frozen=True)
class _Place:
    """What queries or keys belong to: an attention, and the site that takes in what its heads give."""

    joined: str
    attention: Attention
    side: Side


@dataclass(frozen=True)
class AtPStar(AttributionPatching):
    """How much an output changes when parts of a layer take their value in a paired state, to first order but twice.

    :class:`AttributionPatching` with two repairs:

    * Queries and keys: a saturated softmax has no slope, but moves. The weights A are computed again with the part
      replaced, and only what follows them is taken as linear: ``Σ (A(h') - A(h)) · ∂M/∂A``.
    * ``blocks`` (GradDrop): effects by several ways that cancel are found by leaving out one block after another. With
      I_l the estimate whose gradient does not go back through block l, the size of a pair's estimate is
      ``Σ_l |I_l| / (L - 1)``: without the block that the part itself lies in it is 0, hence L - 1. Its sign is that of
      the estimate with all blocks.

    One forward pass and one backward pass a metric, the same for each block again, and one more forward pass where
    there is attention. Outside passes, one softmax of each attention for all heads and positions of its queries, one
    for each position of its keys, and one of a head for each unit.

    Attention is computed from projections that give ``[row, position, unit]``, heads side by side; it looks at all
    keys or at those up to the query, whichever gives what the projection behind it takes in. Other masks (padding) and
    what is added to the logits (biases of positions) are read from ``weights``. Rotary embeddings, norms of queries
    and keys, and keys of fewer heads than queries are refused.

    Args:
        layers: see :class:`.paired.Paired`, as are ``targets``, ``pairs``, ``side``, ``parts``, ``by``, ``way`` and
            ``max_bytes``.
        heads: see :class:`.paired.Paired`; also those of the attention.
        query: projections to queries, in the order in which they run, such as ``"h.*.q_proj"``; one an attention.
        key: those to keys.
        value: those to values.
        joined: projections that take in what the heads give out, side by side.
        weights: where the weights are given out, ``[row, head, query, key]``, such as ``"h.*.attn:1"``; looked at where
            neither mask is right. A weight of 0 counts as masked.
        scale: of the logits; one over the root of a head's units by default.
        blocks: what adds to the residual stream: for each block a module, or several that are left out together.
        sample: how many parts of each layer, evenly spaced, are patched exactly as well (a pass a layer); 0 for none.
        verify: how many of the largest estimates of a network are patched exactly as well; 0 for none.

    Writes:
        What :class:`AttributionPatching` writes, with these estimates.

    Raises:
        NetworkError: the attention named does not give what the projection behind it takes in.

    Source: Kramár et al. 2024, arXiv:2403.00745.
    """

    _: KW_ONLY
    query: Selection | None = None
    key: Selection | None = None
    value: Selection | None = None
    joined: Selection | None = None
    weights: Selection | None = None
    scale: float | None = None
    blocks: tuple[Selection, ...] | None = None

    selections: ClassVar[tuple[str, ...]] = ("layers", *_ATTENTION, "weights", "blocks")
    _heads_with: ClassVar[str] = "with the part 'head' or an attention"

    def __post_init__(self) -> None:
        if isinstance(self.blocks, Sequence) and not isinstance(self.blocks, str):
            blocks = tuple(tuple(one) if isinstance(one, list) else one for one in self.blocks)
            object.__setattr__(self, "blocks", blocks)
        super().__post_init__()
        given = [name for name in _ATTENTION if getattr(self, name) is not None]
        if len(given) not in (0, len(_ATTENTION)):
            raise SettingsError(f"AtPStar needs all of {', '.join(_ATTENTION)} or none, got {', '.join(given)}")
        if not given and (self.weights is not None or self.scale is not None):
            raise SettingsError("AtPStar needs query, key, value and joined with weights or a scale")
        if given and self.side != "output":
            raise SettingsError(f"AtPStar needs side='output' for queries and keys, got {self.side!r}")
        if self.scale is not None and not self.scale > 0:
            raise SettingsError(f"AtPStar needs a scale above 0, got {self.scale}")
        if self.blocks is not None and (not isinstance(self.blocks, tuple) or len(self.blocks) < 2):
            raise SettingsError(f"AtPStar needs 2 blocks or more, one entry each, got blocks={self.blocks!r}")

    @property
    def has_heads(self) -> bool:
        """Whether anything is cut into heads: parts, or an attention."""
        return super().has_heads or self.query is not None

    def changes(self, states: States, model: HookedModel, seen: Seen) -> Changes:
        """Estimate with all blocks and without each, and put the estimates together."""
        attentions = {site: one for site, one in self._attentions(states, model).items() if site in states.before}
        blocks = self._blocks(model)
        if not attentions and not blocks:
            return super().changes(states, model, seen)
        problem = self.problem(states, model)
        joined = list(dict.fromkeys(one.joined for one in attentions.values()))
        plain = {site: list[dict[Part, Tensor]]() for site in states.before if site not in attentions}
        at_joined = {site: list[Tensor]() for site in joined}
        for held in ((), *blocks):
            slopes, inputs = self._slopes(problem, joined, held)
            for site, found in plain.items():
                found.append(self.by_part(states, model, site, slopes[site]))
            for site in joined:
                at_joined[site].append(inputs[site])
        recomputed = {site: self._recomputed(states, site, one, at_joined) for site, one in attentions.items()}
        each = {site: (recomputed | plain)[site] for site in states.before}
        return {
            site: {kind: _together([one[kind] for one in found]) for kind in self.parts} for site, found in each.items()
        }

    def _slopes(
        self, problem: Problem, joined: Sequence[str], held: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return slopes at the sites, and at what some projections take in, with some modules held."""
        sites = [str(site) for site in problem.sites]
        if self.side == "output":
            return gradients_at(problem, sites, joined, held=held)
        return gradients_at(problem, (), sites, held=held)[1], {}

    def _recomputed(
        self, states: States, site: str, place: _Place, slopes: Mapping[str, Sequence[Tensor]]
    ) -> list[dict[Part, Tensor]]:
        """Estimate the effects of the parts of queries or keys, for each pass: ``[part, pair, target]`` by kind."""
        passes = slopes[place.joined]
        moved = in_heads(states.after[site] - states.before[site], self._heads)
        along = in_heads(torch.cat(list(passes)), self._heads)
        found = {kind: place.attention.effects(kind, place.side, moved, along) for kind in self.parts}
        split = {kind: value.to(states.metrics).chunk(len(passes), -1) for kind, value in found.items()}
        return [{kind: split[kind][i] for kind in self.parts} for i in range(len(passes))]

    @property
    def _heads(self) -> int:
        return self.heads or 1

    def _blocks(self, model: HookedModel) -> list[tuple[str, ...]]:
        """Return the sites of each block that this network has."""
        every = [] if self.blocks is None else [model.sites(one) for one in self.blocks]
        found = [sites for sites in every if sites]
        if len(found) == 1:
            raise SettingsError(f"AtPStar needs 2 blocks or more of {model.title}, which has only {found[0]}")
        return found

    # ------------------------------------------------------------------ attention

    def _attentions(self, states: States, model: HookedModel) -> dict[str, _Place]:
        """Return the attention of each site that gives queries or keys."""
        chosen = {name: model.sites(getattr(self, name)) for name in self._named()}
        if len({len(sites) for sites in chosen.values()}) > 1:
            counts = ", ".join(f"{len(sites)} for {name}" for name, sites in chosen.items())
            raise SettingsError(f"AtPStar needs as many sites of each, one an attention; {model.title} has {counts}")
        if not any(chosen.values()):
            return {}
        with model.run(states.base) as run:
            proxies = {
                name: {site: run.get_input(site) if name == "joined" else run.get(site) for site in sites}
                for name, sites in chosen.items()
            }
        found: dict[str, _Place] = {}
        for sites in zip(*chosen.values(), strict=True):
            one = dict(zip(chosen, sites, strict=True))
            attention = self._attention({name: proxies[name][site].resolve() for name, site in one.items()}, one)
            found |= {one[side]: _Place(one["joined"], attention, side) for side in _SIDES}
        return found

    def _named(self) -> tuple[str, ...]:
        return () if self.query is None else _ATTENTION if self.weights is None else (*_ATTENTION, "weights")

    def _attention(self, values: Mapping[str, Tensor], sites: Mapping[str, str]) -> Attention:
        """Compute one attention, and refuse it where it does not give what was observed."""
        for name in _ATTENTION:
            if values[name].ndim != 3 or values[name].shape[-1] % self._heads:
                raise NetworkError(
                    f"AtPStar takes [row, position, unit] with {self._heads} heads side by side; {name}="
                    f"{sites[name]!r} has {tuple(values[name].shape)}"
                )
        query, key, value, joined = (in_heads(values[name], self._heads) for name in _ATTENTION)
        width, weights = query.shape[-1], values.get("weights")
        if key.shape[-1] != width or value.shape[:3] != key.shape[:3] or joined.shape[-1] != value.shape[-1]:
            shapes = {name: tuple(values[name].shape) for name in _ATTENTION}
            raise NetworkError(f"AtPStar needs heads of one size, as many for keys as for queries, got {shapes}")
        scale = width**-0.5 if self.scale is None else self.scale
        attention = attention_like(joined, query, key, value, scale)
        tolerance = max(1e-4, 32 * torch.finfo(values["joined"].dtype).eps)
        if weights is not None and attention.off(joined) > tolerance:
            attention = replace(attention, logits=weights.double().log())
        if (off := attention.off(joined)) > tolerance:
            raise NetworkError(
                f"AtPStar computed {off:.2g} (of the largest) past what {sites['joined']!r} takes in, from "
                f"{sites['query']!r}, {sites['key']!r} and {sites['value']!r}, scale {scale:.3g}, {self._heads} heads: "
                "give the scale; for padding or biases in the logits the site of the weights; rotary embeddings and "
                "norms of queries and keys are not handled"
            )
        return attention


def _together(estimates: Sequence[Tensor]) -> Tensor:
    """Put estimates with all blocks, and without each, together."""
    whole, *without = estimates
    if not without:
        return whole
    size = torch.stack(without).abs().sum(0) / (len(without) - 1)
    return torch.where(whole < 0, -size, size)
