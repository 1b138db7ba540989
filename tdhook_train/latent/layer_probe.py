"""What probes of all layers share: which layers and rows, folds by trajectory, baselines, when there is a null."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.errors import GroupsError, SettingsError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.method import Method, Part, Parts, Seen, look
from tdhook_train.ops.folds import fold_of, in_blocks
from tdhook_train.ops.join import Labels, Measured
from tdhook_train.ops.targets import columns, named

__all__ = ["LayerProbe", "LayerReader", "against_shifts", "null_place"]


@dataclass(frozen=True)
class LayerReader(Method):
    """A read-out of every layer, for which rows are told apart by trajectory.

    Args:
        layers: paths, patterns, module classes or predicates.
        target: what is predicted.
    """

    layers: Selection = "**"
    target: Any = "output"

    by_trajectory: ClassVar[bool] = True
    looks_back: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (shifts := getattr(self, "shifts", 0)) < 0:
            raise SettingsError(f"{type(self).__name__} needs 0 or more shifts, got shifts={shifts}")
        named(self.target)

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers."""
        return self.scored(model)

    def scored(self, model: HookedModel) -> Sequence[str]:
        """The layers that have scores; :meth:`taps` may name more."""
        return model.sites(self.layers)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Layers and targets."""
        targets, sites = columns(seen.batch, named(self.target), len(seen.batch)), list(self.scored(model))
        return {"layer": sites, "layer_type": [model.kind(site) for site in sites], "target": list(targets)}

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Score every layer of one network."""
        return self._scores({"": Part(seen, model)}).tensordict()

    def across(self, parts: Parts) -> Measured:
        """Score the layers of all networks together, in one batch."""
        parts = self.applies_to(parts)
        scored = self._scores(parts)
        labels = [self.labels(part.seen, part.model) for part in parts.values()]
        layers = [
            f"{name}.{site}" if name else site for name, own in zip(parts, labels, strict=True) for site in own["layer"]
        ]
        kinds = [kind for own in labels for kind in own["layer_type"]]
        return replace(scored, labels=labels[0] | {"layer": layers, "layer_type": kinds})

    @abstractmethod
    def _scores(self, parts: Parts) -> Measured:
        """Score the layers of all networks, in order."""

    def _blocks(self, parts: Parts, rows: int) -> list[Tensor]:
        return [self._block(part, site, rows) for part in parts.values() for site in self.scored(part.model)]

    def _block(self, part: Part, site: str, rows: int) -> Tensor:
        value = self._features(part.seen.values, site, part.model)
        if len(value) != rows:
            name, shape = type(self).__name__, tuple(part.seen.values[site].shape)
            raise GroupsError(f"{name}: {site!r} gives {shape} for {rows} rows; name layers with one row a sample")
        return value

    def _features(self, values: Mapping[str, Tensor], site: str, model: HookedModel) -> Tensor:
        """Return what a layer is probed by, rows first, from the values of all that is tapped."""
        return _flat(values[site], model.row_axis(site))

    def _raw(self, features: Tensor) -> Tensor:
        """Return what the raw input is probed by, from its features ``[rows, features]``."""
        return features

    def _groups(self, seen: Seen, rows: int) -> Tensor:
        """Trajectory of each row; every row its own where none are known."""
        groups = torch.arange(rows) if seen.groups is None else seen.groups.cpu()
        if len(groups) != rows:
            raise GroupsError(f"{type(self).__name__}: {len(groups)} trajectory ids for {rows} rows")
        return groups

    def _baseline_blocks(self, parts: Parts) -> tuple[list[Tensor], list[Tensor]]:
        """Return the raw inputs of each network, and the layers of the initial networks."""
        raw, initial = [], []
        for part in parts.values():
            inputs = [part.seen.batch.get(key) for key in part.model.in_keys]
            raw.append(self._raw(torch.cat([_flat(v.to(torch.get_default_dtype())) for v in inputs], 1)))
            if part.seen.initial is not None:
                values, _ = look(part.seen.initial, part.seen.batch, self.taps(part.model))
                initial += [self._features(values, site, part.model) for site in self.scored(part.model)]
        return raw, initial

    def _spread(self, scores: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        """Give each layer its two baselines, from the scores ``[..., block, target]`` of :meth:`_baseline_blocks`."""
        counts = torch.tensor([len(self.scored(part.model)) for part in parts.values()])
        raw, initial = scores[..., : len(parts), :].repeat_interleave(counts, -2), scores[..., len(parts) :, :]
        return raw, initial if initial.shape[-2] else torch.full_like(raw, torch.nan)

    def _remembered(self, parts: Parts, y: Tensor, score: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Score the blocks of :meth:`_baseline_blocks`, once for the same targets."""
        memo = next(iter(parts.values())).seen.memo
        if "baselines" not in memo or not torch.equal(memo["baselines"][0], y):
            raw, initial = self._baseline_blocks(parts)
            memo["baselines"] = y, score(raw + initial)
        found: Tensor = memo["baselines"][1]
        return found

    def _no_null(self, seen: Seen, shifts: int) -> int:
        """Say why nothing can be shifted, by the codes of ``null_reason``; 0 where it can."""
        if shifts == 0:
            return 3
        return 0 if seen.ordered and seen.groups is not None and in_blocks(seen.groups) else 2


@dataclass(frozen=True)
class LayerProbe(LayerReader):
    """A read-out of every layer, cross-validated by trajectory.

    Args:
        layers: paths, patterns, module classes or predicates.
        target: what is predicted.
        folds: number of folds.
    """

    folds: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 2:
            raise SettingsError(f"{type(self).__name__} needs at least 2 folds, got folds={self.folds}")

    def _folds(self, seen: Seen, rows: int) -> Tensor:
        return fold_of(self._groups(seen, rows), self.folds)


def null_place(shifts: int) -> int:
    """Return the place among sorted scores of shifts of the one to beat at 5 %: the 19th of 19, the 38th of 39.

    With fewer than 19 shifts the best: no test at 5 % is possible.
    """
    return min(round(0.95 * (shifts + 1)), shifts) - 1


def against_shifts(
    mean: Tensor, shifted: Tensor | None, sign: Tensor, failed: tuple[Tensor, Tensor], why_not: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hold scores against those of shifted targets.

    Args:
        mean: ``[score, block, target]``.
        shifted: ``[score, block, target, shift]``; None where nothing was shifted.
        sign: of each score, ``[score]``: -1 where less is better.
        failed: what has no score itself, and what has none for its shifts, ``[block, target]`` each.
        why_not: why nothing was shifted, by the codes of ``null_reason``.

    Returns:
        The null of each score and p, ``[score, block, target]``, and why they are NaN, ``[block, target]``.
    """
    missing, lost = failed
    if shifted is None:
        nan = torch.full_like(mean, torch.nan)
        return nan, nan, torch.where(missing & (why_not == 0), 1, why_not).to(torch.int8)
    sign, count = sign[:, None, None], shifted.shape[-1]
    shifted, own = shifted * sign[..., None], mean * sign
    null = shifted.sort(-1).values[..., null_place(count)] * sign
    p = (1 + (shifted >= own[..., None]).sum(-1)).double() / (count + 1)
    reason = torch.where(missing, 1, torch.where(lost, 4, 0)).to(torch.int8)
    kept = (reason == 0) & mean.isfinite()
    return torch.where(kept, null, torch.nan), torch.where(kept, p, torch.nan), reason


def _flat(value: Tensor, row_axis: int = 0) -> Tensor:
    """Bring a value to ``[rows, features]``; one without rows counts as one row."""
    return value.movedim(row_axis, 0).flatten(1) if value.ndim > 1 else value.reshape(-1, 1)
