"""What each layer and each unit carries: its activation replaced by its value in another state, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.layout import ELEMENTWISE
from tdhook_train.hooks.readers import sole_readers
from tdhook_train.hooks.versions import run_versions
from tdhook_train.keys import path_of
from tdhook_train.method import Method, Seen, look
from tdhook_train.ops.join import Labels
from tdhook_train.ops.targets import beside, explained, named
from tdhook_train.ops.units import evenly_spaced, padded

__all__ = ["ActivationPatching"]

_ROWS_PER_PASS = 8192  # patched rows at a time: caps memory on wide layers


@dataclass(frozen=True)
class ActivationPatching(Method):
    """How much an output changes when a layer, or one unit of it, takes the value it has in a paired state.

    Exact: for every patch the rest of the network is run. All patches of a layer go through the layers after it in
    one batch; one forward pass a layer, from that layer on where the network allows it, and none for a layer whose
    only reader is an elementwise activation (replacing a unit before or after it is the same).

    Args:
        layers: paths, patterns, module classes or predicates of the layers to patch.
        targets: the metrics: an output key, a key with a feature index, a function of the TensorDict of outputs and of
            what the batch holds of the state that is patched (such as its true class) that gives one number a row, a
            list or a mapping of names to these. By default every feature of the first output.
        pairs: number of paired states. Rows spread evenly over the batch are each paired with the row half the batch
            further on; sources given as ``("source", key)`` in the batch are used instead, row by row.

    Writes:
        ``effect`` [layer, target] and ``unit_effect`` [layer, unit, target]: mean over pairs of
        ``|M(do h = h') - M(base)|``, in units of the target. ``gap`` [layer, target]: mean ``|M(source) - M(base)|``.
        ``normalised``, ``unit_normalised``: the part of the gap that the patch closes,
        ``Σ s·(M(do) - M(base)) / Σ|gap|`` with s the sign of each pair's gap: 1 where the patch gives the source's
        output, 0 where it does nothing.
        Units that a layer does not have are NaN, as is everything where all gaps are 0.

    Source: Vig et al. 2020, arXiv:2004.12265; Zhang and Nanda 2024, arXiv:2309.16042.
    """

    layers: Selection = "**"
    targets: Any = None
    pairs: int = 64

    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {
        "effect": "layer target",
        "normalised": "layer target",
        "gap": "layer target",
        "unit_effect": "layer unit target",
        "unit_normalised": "layer unit target",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 2:
            raise SettingsError(f"ActivationPatching needs at least 2 pairs, got pairs={self.pairs}")
        if self.targets is not None:
            named(self.targets)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The layers and the metrics."""
        sites = model.sites(self.layers)
        targets = list(self._columns(seen.batch, model))
        return {"layer": list(sites), "layer_type": [model.kind(site) for site in sites], "target": targets}

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Patch every layer and every unit of one network."""
        base, source = self._pair(seen, model)
        sites = model.sites(self.layers)
        values, outputs = look(model, torch.cat([base, source]), sites)
        metrics = self._metrics(outputs, base, model)
        known = ("same patch", model.name)
        if known not in seen.memo:
            seen.memo[known] = _same_patch(model, sites, base[:2])
        twins = seen.memo[known]
        done: dict[str, Tensor] = {}
        for site in reversed(sites):
            twin = twins.get(site)
            before, after = values[site].chunk(2, model.row_axis(site))
            expected = outputs[: len(base)]
            # the same units only where both count them along the same dimension
            same = twin and model.unit_axis(twin, before) == model.unit_axis(site, before)
            done[site] = done[twin] if same else self._patched(model, base, site, (before, after), expected)
        return _summary([done[site] for site in sites], *metrics.chunk(2))

    def _columns(
        self, outputs: TensorDictBase, model: HookedModel, held: TensorDictBase | None = None
    ) -> Mapping[str, Tensor]:
        return explained(outputs, self.targets, model.out_keys, len(outputs), held)

    def _metrics(self, outputs: TensorDictBase, base: TensorDict, model: HookedModel) -> Tensor:
        """Return the metrics of versions of one batch, ``[version * pair, target]``."""
        count = len(outputs) // len(base)
        known = {
            key: value.repeat(count, *[1] * (value.ndim - 1))
            for key, value in beside(base, self.targets, model.out_keys).items()
        }
        read = TensorDict(known, batch_size=outputs.batch_size).update(outputs) if known else outputs
        held = TensorDict(known, batch_size=outputs.batch_size)
        return torch.stack(list(self._columns(read, model, held).values()), 1).detach()

    def _patched(
        self, model: HookedModel, base: TensorDict, site: str, values: tuple[Tensor, Tensor], expected: TensorDictBase
    ) -> Tensor:
        """Return the metrics with the whole layer patched, then with each unit: ``[1 + unit, pair, target]``."""
        before, after = values
        pairs, axis = len(base), model.unit_axis(site, before)
        units = before.shape[axis] if before.ndim > 1 else 0
        found = []
        for chunk in torch.arange(units + 1).split(max(1, _ROWS_PER_PASS // pairs)):
            swapped = torch.zeros(len(chunk) + 1, max(units, 1), dtype=torch.bool, device=before.device)
            swapped[1:] = chunk[:, None] == torch.arange(1, max(units, 1) + 1)  # the first version stays unchanged
            swapped[1:][chunk == 0] = True  # patch 0 is the whole layer
            shape = [len(chunk) + 1, *[units if units and i == axis else 1 for i in range(before.ndim)]]
            versions = torch.where(swapped.view(shape), after, before)
            metrics = self._metrics(run_versions(model, base, site, versions, expected), base, model)
            found.append(metrics.unflatten(0, (len(chunk) + 1, pairs))[1:])
        return torch.cat(found)

    def _pair(self, seen: Seen, model: HookedModel) -> tuple[TensorDict, TensorDict]:
        """Return base and source inputs, row by row; with both, what functions may read of the base."""
        inputs = {key: seen.batch.get(key) for key in model.in_keys}
        prefixed = {key: ("source", *path_of(key)) for key in inputs}
        given = {key: seen.batch.get(prefixed[key], None) for key in inputs}
        rows = len(seen.batch)
        if any(value is not None for value in given.values()):
            index = evenly_spaced(rows, self.pairs)
            sources = {k: (inputs[k] if v is None else v)[index] for k, v in given.items()}
        elif rows < 2:
            raise SettingsError(f"ActivationPatching pairs rows with each other and needs 2 or more, got {rows}")
        else:
            index = evenly_spaced(rows, min(self.pairs, rows - rows % 2))
            sources = {key: value[index.roll(len(index) // 2)] for key, value in inputs.items()}
        bases = {key: value[index] for key, value in inputs.items()}
        still = beside(seen.batch, self.targets, [*model.in_keys, *model.out_keys])
        known = {key: value[index] for key, value in still.items()}
        base, source = (TensorDict(known | values, batch_size=[len(index)]) for values in (bases, sources))
        return base, source


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


def _summary(patched: Sequence[Tensor], base: Tensor, source: Tensor) -> TensorDict:
    """Average over pairs; ``patched`` holds ``[1 + unit, pair, target]`` a layer, the others ``[pair, target]``."""
    gap = source - base
    size = gap.abs().sum(0)
    effects = padded([(value - base).abs().mean(1) for value in patched])  # [layer, 1 + unit, target]
    closed = padded([((value - base) * gap.sign()).sum(1) / size for value in patched])
    values = {
        "effect": effects[:, 0],
        "unit_effect": effects[:, 1:],
        "normalised": closed[:, 0],
        "unit_normalised": closed[:, 1:],
        "gap": (size / len(gap)).expand(len(patched), -1).clone(),
    }
    return TensorDict(values, batch_size=[])
