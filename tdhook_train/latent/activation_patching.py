"""What each layer and each part of it carries: its activation replaced by its value in another state, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError, TargetError
from tdhook_train.hooks import HookedModel
from tdhook_train.hooks.layout import ELEMENTWISE
from tdhook_train.hooks.readers import sole_readers
from tdhook_train.latent.paired import PREFIX, Changes, Paired, States, by_layer
from tdhook_train.method import Seen
from tdhook_train.ops.targets import first_floating, label_of, named, read

__all__ = ["ActivationPatching"]

_DECIDED = ("counterfactual", "class")


@dataclass(frozen=True)
class ActivationPatching(Paired):
    """How much an output changes when a layer, or a part of it, takes the value it has in a paired state.

    Exact: for every patch the rest of the network is run. All patches of a layer go through the layers after it in
    one batch; one forward pass a layer, from that layer on where the network allows it, and none for a layer whose
    only reader is an elementwise activation (replacing a unit before or after it is the same).

    Args:
        layers: see :class:`.paired.Paired`, as are ``targets``, ``pairs``, ``side``, ``parts``, ``heads``, ``by``,
            ``way`` and ``max_bytes``.
        counterfactual: what a causal model decides where the part takes the source's value, for interchange accuracy:
            a key of the batch with the number of the class, one feature of a key, or a function of the batch.
        decision: what the network decides, with ``counterfactual``: logits of classes, the largest of which counts, or
            the number of the class; the first output by default.

    Writes:
        ``effect`` [layer, target], ``unit_effect`` [layer, unit, target], and so on for ``head_`` and ``position_``:
        mean over pairs of ``|M(do h = h') - M(base)|``, in units of the target. With paired states: ``gap``
        [layer, target]: mean ``|M(source) - M(base)|``; ``normalised``, ``unit_normalised``, …: the part of the gap
        that the patch closes, ``Σ s·(M(do) - M(base)) / Σ|gap|`` with s the sign of each pair's gap: 1 where the patch
        gives the source's output, 0 where it does nothing. Units that a layer does not have are NaN, as is the part
        where all gaps are 0. Of denoising, the same keys with ``_denoise`` at the end. With ``counterfactual`` also
        ``interchange`` [layer], ``unit_interchange`` [layer, unit], …: share of the pairs in which the patched network
        decides as the causal model.

    Source: Vig et al. 2020, arXiv:2004.12265; noising and denoising: Zhang and Nanda 2024, arXiv:2309.16042,
    Heimersheim and Nanda 2024, arXiv:2404.15255; resample ablation: Chan et al. 2022, "Causal scrubbing"; interchange
    interventions: Geiger et al. 2021, arXiv:2106.02997.
    """

    _: KW_ONLY
    counterfactual: Any = None
    decision: Any = None

    writes: ClassVar[Mapping[str, str]] = {
        **Paired.writes,
        **{f"{prefix}interchange": f"layer {prefix.rstrip('_')}".strip() for prefix in PREFIX.values()},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.counterfactual is None and self.decision is not None:
            raise SettingsError(f"ActivationPatching needs a counterfactual to hold decision={self.decision!r} against")
        if self.counterfactual is not None and (self.by != "source" or self.way != "noise"):
            raise SettingsError(
                f"ActivationPatching needs by='source' and way='noise' for interchanges, got {self.by!r}, {self.way!r}"
            )
        for given in (self.counterfactual, self.decision):
            if given is not None:
                named(given)

    def changes(self, states: States, model: HookedModel, seen: Seen) -> Changes:
        """Patch every part of every layer."""
        twins = self._twins(states, model, seen)
        done: Changes = {}
        for site in reversed(states.before):
            twin = twins.get(site)
            before = states.before[site]
            # the same units only where both count them along the same dimension
            same = twin and model.unit_axis(twin, before) == model.unit_axis(site, before)
            done[site] = done[twin] if twin and same else self.every_part(states, model, site)
        return done

    def kept(self, seen: Seen) -> dict[NestedKey, Tensor]:
        """Keep what the causal model decides."""
        if self.counterfactual is None:
            return {}
        decided = read(seen.batch, self.counterfactual)
        if decided.numel() != len(seen.batch) or decided.is_floating_point():
            raise TargetError(
                f"counterfactual {label_of(self.counterfactual)!r} needs the number of one class a row, has "
                f"{decided.dtype}, {tuple(decided.shape)}"
            )
        return {_DECIDED: decided.reshape(-1)}

    def metrics(self, outputs: TensorDictBase, base: TensorDict, model: HookedModel) -> Tensor:
        """Return the metrics, and behind them whether the decision is the counterfactual one."""
        found = super().metrics(outputs, base, model)
        if self.counterfactual is None:
            return found
        decision = read(outputs, first_floating(outputs, model.out_keys) if self.decision is None else self.decision)
        decision = decision.argmax(-1) if decision.is_floating_point() else decision
        hit = decision.reshape(-1, len(base)) == base.get(_DECIDED)
        return torch.cat([found, hit.reshape(-1, 1).to(found)], 1)

    def summary(self, changes: Changes, states: States, sites: Sequence[str]) -> dict[str, Tensor]:
        """Average over pairs, decisions apart."""
        found = super().summary(changes, states, sites)
        if self.counterfactual is None:
            return found
        found = {key: value[..., :-1] for key, value in found.items()}
        for kind in self.parts:
            hits = [(changes[site][kind] + states.metrics).mean(1)[:, -1:] for site in sites]
            found[f"{PREFIX[kind]}interchange"] = by_layer(kind, hits)[..., 0]
        return found

    def _twins(self, states: States, model: HookedModel, seen: Seen) -> dict[str, str]:
        if self.side == "input" or self.by in ("zero", "mean"):  # what the activation makes of 0 need not be 0
            return {}
        known = ("same patch", model.name)
        if known not in seen.memo:
            seen.memo[known] = _same_patch(model, list(states.before), states.base[:2])
        twins: dict[str, str] = seen.memo[known]
        return twins


def _same_patch(model: HookedModel, sites: Sequence[str], inputs: TensorDict) -> dict[str, str]:
    """Map each site whose only reader is an elementwise activation to that activation's site.

    Candidates are neighbours of which the second was given the first's very tensor. They are proven on the graph of
    one small pass: nothing but the activation differentiates through the first.
    """
    pairs = [(row.previous, str(row.site)) for row in model.traced if row.previous is not None]
    near = {before: after for before, after in pairs if {before, after} <= set(sites)}
    candidates = {b: a for b, a in near.items() if isinstance(model.module_of(a), ELEMENTWISE)}
    readers = sole_readers(model, inputs, [*candidates, *candidates.values()]) if candidates else {}
    return {before: after for before, after in candidates.items() if readers.get(before) == after}
