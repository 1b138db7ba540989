"""What replacing parts of activations by those of another state does: the settings and the states, exactly or not."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import NetworkError, SettingsError, did_you_mean
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.versions import run_versions
from tdhook_train.keys import path_of
from tdhook_train.method import Method, Seen
from tdhook_train.ops.cuts import PARTS, Cut, Part, cut, shared_out
from tdhook_train.ops.join import Labels
from tdhook_train.ops.substitutes import substitutes
from tdhook_train.ops.targets import beside, explained, named
from tdhook_train.ops.units import evenly_spaced, padded

__all__ = ["PREFIX", "Changes", "Paired", "States", "by_layer", "keys_of"]

_MOST_ROWS, _NUMBERS = 8192, 1 << 25  # of patched rows at a time, and numbers of the largest activation

Changes = dict[str, dict[Part, Tensor]]
"""How far the metrics move, ``[part, pair, target]`` for each site and kind of part."""

PREFIX: dict[Part, str] = {"layer": "", "unit": "unit_", "head": "head_", "position": "position_"}
_WAYS = {"noise": ("",), "denoise": ("_denoise",), "both": ("", "_denoise")}


def keys_of(*names: str) -> dict[str, str]:
    """Name the dimensions of artifacts that there is one of for every kind of part, and every way."""
    return {
        f"{prefix}{name}{way}": f"layer {prefix.rstrip('_')} target" if prefix else "layer target"
        for name in names
        for prefix in PREFIX.values()
        for way in _WAYS["both"]
    }


@dataclass(frozen=True)
class States:
    """Paired states of one network.

    Args:
        base: inputs of the states that are patched, and what functions among the targets read, ``[pair]``.
        before: what each site has there.
        after: what it is given instead.
        outputs: of the base.
        metrics: of the base, ``[pair, target]``.
        gap: metrics of the other state less those of the base, ``[pair, target]``; None where there is no such state.
    """

    base: TensorDict
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    outputs: TensorDictBase
    metrics: Tensor
    gap: Tensor | None


@dataclass(frozen=True)
class Paired(Method):
    """What a metric does when a layer, or a part of it, takes the value it has in a paired state.

    Args:
        layers: paths, patterns, module classes or predicates of the layers to patch.
        targets: the metrics: an output key, a key with a feature index, a function of the TensorDict of outputs and of
            what the batch holds of its own state (such as its true class) that gives one number a row, a list or a
            mapping of names to these. By default every feature of the first output.
        pairs: number of paired states. Rows spread evenly over the batch are each paired with the row half the batch
            further on; sources given as ``("source", key)`` in the batch are used instead, row by row.
        side: whether what layers give out is replaced, or what they take in: of the projection that joins attention
            heads, ``side="input"`` with ``heads`` patches each head's output.
        parts: what is replaced at a time: a whole ``"layer"``, a ``"unit"`` of it at all positions, a ``"head"``, a
            ``"position"`` with all its units.
        heads: how many heads the units of a layer are, in blocks of one size side by side.
        by: what replaces an activation: its value in the paired state (``"source"``), 0 (``"zero"``), its mean over
            all states (``"mean"``), or its value in another of the states, drawn (``"resample"``).
        way: where the rows of the batch are the clean states and the sources corrupt ones, ``"noise"`` puts corrupt
            values into clean states, ``"denoise"`` clean values into corrupt states, whose keys end in ``_denoise``.
        max_bytes: bound on the memory of a pass, in bytes: activations of all layers. By default at most 8,192 rows go
            at once, fewer where the largest activation is wide.
    """

    layers: Selection = "**"
    targets: Any = None
    pairs: int = 64
    _: KW_ONLY
    side: Literal["output", "input"] = "output"
    parts: tuple[Part, ...] = ("layer", "unit")
    heads: int | None = None
    by: Literal["source", "zero", "mean", "resample"] = "source"
    way: Literal["noise", "denoise", "both"] = "noise"
    max_bytes: int | None = None

    looks_back: ClassVar[bool] = False
    _heads_with: ClassVar[str] = "with the part 'head'"
    writes: ClassVar[Mapping[str, str]] = keys_of("effect", "normalised") | {"gap": "layer target"}

    def __post_init__(self) -> None:
        super().__post_init__()
        parts, name = (self.parts,) if isinstance(self.parts, str) else tuple(self.parts), type(self).__name__
        object.__setattr__(self, "parts", parts)
        if self.pairs < 2:
            raise SettingsError(f"{name} needs at least 2 pairs, got pairs={self.pairs}")
        if not parts:
            raise SettingsError(f"{name} needs a part of layers to patch, of {', '.join(PARTS)}; got parts=()")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise SettingsError(f"{name} needs memory for a pass, 1 byte or more, got max_bytes={self.max_bytes}")
        if self.has_heads != (self.heads is not None) or (self.heads is not None and self.heads < 1):
            raise SettingsError(f"{name} needs heads, 1 or more, {self._heads_with} and only then: {self.heads}")
        for setting, given, known in (
            *(("parts", part, PARTS) for part in parts),
            ("side", self.side, ("output", "input")),
            ("by", self.by, ("source", "zero", "mean", "resample")),
            ("way", self.way, tuple(_WAYS)),
        ):
            if given not in known:
                near = did_you_mean(given, known) if isinstance(given, str) else ""
                raise SettingsError(f"{name}: {setting}={given!r} is none of {', '.join(map(repr, known))}{near}")
        if self.way != "noise" and self.by != "source":
            raise SettingsError(f"{name} needs by='source' to denoise, got by={self.by!r}")
        if self.targets is not None:
            named(self.targets)

    @property
    def has_heads(self) -> bool:
        """Whether anything is cut into heads."""
        return "head" in self.parts

    @abstractmethod
    def changes(self, states: States, model: HookedModel, seen: Seen) -> Changes:
        """Say how far replacing each part moves the metrics."""

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The layers and the metrics."""
        sites = model.sites(self.layers)
        kinds, targets = [model.kind(site) for site in sites], list(self._columns(seen.batch, model))
        return {"layer": list(sites), "layer_type": kinds, "target": targets}

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Patch every part of one network."""
        found: dict[NestedKey, Tensor] = {}
        sites = list(model.sites(self.layers))
        for ending, states in zip(_WAYS[self.way], self._states(seen, model), strict=True):
            summary = self.summary(changes := self.changes(states, model, seen), states, sites)
            found |= {key if key == "gap" else key + ending: value for key, value in summary.items()}
            found |= {key + ending: value for key, value in self.further(changes, states, model).items()}
        return TensorDict(found, batch_size=[])

    def further(self, changes: Changes, states: States, model: HookedModel) -> dict[str, Tensor]:  # noqa: ARG002
        """Return artifacts beside the :meth:`summary`."""
        return {}

    def kept(self, seen: Seen) -> dict[NestedKey, Tensor]:  # noqa: ARG002 - subclasses use it
        """Return what else of the batch goes with the states that are patched, ``[row, ...]``."""
        return {}

    # ------------------------------------------------------------------ exact

    def exact(self, states: States, model: HookedModel, site: str, masks: Sequence[tuple[Cut, Tensor]]) -> Tensor:
        """Return how far the metrics move with each of some parts of one site replaced: ``[part, pair, target]``.

        Args:
            states: the pairs.
            model: whose rest is run.
            site: where.
            masks: numbers of the parts, by cut.
        """
        before, after = states.before[site], states.after[site]
        at_once = max(1, self._rows_per_pass(model) // len(states.base) - 1)
        still = torch.zeros([1] * (before.ndim + 1), dtype=torch.bool, device=before.device)
        found = [states.metrics.new_zeros(0, *states.metrics.shape)]
        for some in shared_out(masks, at_once):
            swapped = [still, *(cut_.masks(index) for cut_, index in some)]  # the first version stays unchanged
            shape = torch.broadcast_shapes(*(mask.shape[1:] for mask in swapped))
            versions = torch.where(torch.cat([mask.expand(-1, *shape) for mask in swapped]), after, before)
            metrics = self.metrics(self.outputs(states, model, site, versions), states.base, model)
            each = metrics.unflatten(0, (len(versions), len(states.base)))
            found.append(each[1:] - each[:1])  # of one pass: what nothing reaches stays exactly 0
        return torch.cat(found)

    def every_part(self, states: States, model: HookedModel, site: str) -> dict[Part, Tensor]:
        """Return how far the metrics move with each part of one site replaced: ``[part, pair, target]`` by kind."""
        cuts = self.cuts(states, model, site)
        found = self.exact(states, model, site, [(one, torch.arange(one.count)) for one in cuts.values()])
        return dict(zip(cuts, found.split([one.count for one in cuts.values()]), strict=True))

    def outputs(self, states: States, model: HookedModel, site: str, versions: Tensor) -> TensorDict:
        """Return what the network gives out for versions of one site, the first unchanged: ``[version * pair]``."""
        return run_versions(model, states.base, site, versions, states.outputs, self.side)

    def cuts(self, states: States, model: HookedModel, site: str) -> dict[Part, Cut]:
        """Return what one site falls into, by kind of part."""
        value = states.before[site]
        axes = self.row_axis(model, site), model.unit_axis(site, value)
        cuts = {kind: cut(kind, value.shape, axes, self.heads) for kind in self.parts}
        return {kind: replace(one, of=one.of.to(value.device)) for kind, one in cuts.items()}

    def row_axis(self, model: HookedModel, site: str) -> int:
        """Say along which dimension of a site's value the rows lie."""
        return model.row_axis(site) if self.side == "output" else 0

    def metrics(self, outputs: TensorDictBase, base: TensorDict, model: HookedModel) -> Tensor:
        """Return the metrics of versions of one batch, ``[version * pair, target]``."""
        return torch.stack(list(self.columns(outputs, base, model).values()), 1).detach()

    def columns(self, outputs: TensorDictBase, base: TensorDictBase, model: HookedModel) -> Mapping[str, Tensor]:
        """Read the metrics of versions of one batch, ``[version * pair]`` each, in the outputs' graph."""
        count, still = len(outputs) // len(base), beside(base, self.targets, model.out_keys)
        known = {key: value.repeat(count, *[1] * (value.ndim - 1)) for key, value in still.items()}
        held = TensorDict(known, batch_size=outputs.batch_size)
        return self._columns(held.copy().update(outputs) if known else outputs, model, held)

    def _columns(
        self, outputs: TensorDictBase, model: HookedModel, held: TensorDictBase | None = None
    ) -> Mapping[str, Tensor]:
        return explained(outputs, self.targets, model.out_keys, len(outputs), held)

    def _rows_per_pass(self, model: HookedModel) -> int:
        sizes = [site.size for site in model.traced]
        if self.max_bytes is not None:
            return self.max_bytes // max(1, sum(sizes) * torch.get_default_dtype().itemsize)
        return min(_MOST_ROWS, _NUMBERS // max(1, *sizes))

    # ------------------------------------------------------------------ states

    def _states(self, seen: Seen, model: HookedModel) -> Iterator[States]:
        base, source = self._pair(seen, model)
        values, outputs = self._look(model, torch.cat([base, source]))
        halves = outputs[: len(base)], outputs[len(base) :]
        metrics = self.metrics(outputs, base, model).chunk(2)
        pairs = {site: value.chunk(2, self.row_axis(model, site)) for site, value in values.items()}
        for ending in _WAYS[self.way]:
            one, other = (0, 1) if ending == "" else (1, 0)
            before = {site: halves[one] for site, halves in pairs.items()}
            after = {site: halves[other] for site, halves in pairs.items()}
            if self.by != "source":
                axes = {site: self.row_axis(model, site) for site in values}
                after = substitutes(self.by, values, before, axes, seen.generator)
            patched = base if one == 0 else base.copy().update(source.select(*model.in_keys))
            gap = metrics[other] - metrics[one] if self.by == "source" else None
            yield States(patched, before, after, halves[one], metrics[one], gap)

    def _look(self, model: HookedModel, inputs: TensorDict) -> tuple[dict[str, Tensor], TensorDictBase]:
        sites = model.sites(self.layers)
        with model.run(inputs) as run:
            read = run.get if self.side == "output" else run.get_input
            proxies = {site: read(site) for site in sites}
        values = {site: proxy.resolve() for site, proxy in proxies.items()}
        for site, value in values.items():
            axis = self.row_axis(model, site)
            if value.ndim <= axis or value.shape[axis] != len(inputs):
                given = f"the {self.side} of {site!r} has {tuple(value.shape)} for {len(inputs)} rows"
                name = type(self).__name__
                raise NetworkError(f"{name} patches row by row; {given}: name layers with one row a sample")
        return values, run.output.select(*model.out_keys, strict=False)

    def _pair(self, seen: Seen, model: HookedModel) -> tuple[TensorDict, TensorDict]:
        """Return base and source inputs, row by row; with both, what functions may read of the base."""
        inputs = {key: seen.batch.get(key) for key in model.in_keys}
        given = {key: seen.batch.get(("source", *path_of(key)), None) for key in inputs}
        rows = len(seen.batch)
        if any(value is not None for value in given.values()):
            index = evenly_spaced(rows, self.pairs)
            sources = {k: (inputs[k] if v is None else v)[index] for k, v in given.items()}
        elif rows < 2:
            raise SettingsError(f"{type(self).__name__} pairs rows with each other and needs 2 or more, got {rows}")
        else:
            index = evenly_spaced(rows, min(self.pairs, rows - rows % 2))
            sources = {key: value[index.roll(len(index) // 2)] for key, value in inputs.items()}
        bases = {key: value[index] for key, value in inputs.items()}
        still = beside(seen.batch, self.targets, [*model.in_keys, *model.out_keys])
        known = {key: value[index] for key, value in (still | self.kept(seen)).items()}
        base, source = (TensorDict(known | values, batch_size=[len(index)]) for values in (bases, sources))
        return base, source

    # ------------------------------------------------------------------ what is kept

    def summary(self, changes: Changes, states: States, sites: Sequence[str]) -> dict[str, Tensor]:
        """Average over pairs."""
        found: dict[str, Tensor] = {}
        for kind in self.parts:
            moved = [changes[site][kind] for site in sites]
            found[f"{PREFIX[kind]}effect"] = by_layer(kind, [change.abs().mean(1) for change in moved])
            if states.gap is not None:
                sign, size = states.gap.sign(), states.gap.abs().sum(0)
                closed = [(change * sign).sum(1) / size for change in moved]
                found[f"{PREFIX[kind]}normalised"] = by_layer(kind, closed)
        if states.gap is not None:
            found["gap"] = states.gap.abs().mean(0).expand(len(sites), -1).clone()
        return found


def by_layer(kind: Part, values: Sequence[Tensor]) -> Tensor:
    """Lay what was found of each layer, ``[part, target]``, side by side; without a dimension of parts for layers."""
    return padded(values)[:, 0] if kind == "layer" else padded(values)
