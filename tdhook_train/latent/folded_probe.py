"""What probes share that are fitted layer by layer and fold by fold: scores, baselines, the null, and reasons."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_train.hooks import HookedModel
from tdhook_train.latent.folded_targets import FoldedTargets, was_scored
from tdhook_train.latent.layer_probe import LayerProbe, against_shifts
from tdhook_train.method import Parts, Seen
from tdhook_train.ops.classification import classes_of
from tdhook_train.ops.folds import circular_shifts
from tdhook_train.ops.held_out import Predicted, empty, mean_scores, scores_of, stacked
from tdhook_train.ops.join import Labels, Measured
from tdhook_train.ops.targets import columns, named

__all__ = ["Fits", "FoldedProbe", "Split", "key_of", "written"]

_NUMBERS = 1 << 24  # predicted at a time
_KINDS = ("", "_pooled", "_observation", "_initial", "_null", "_p")


def key_of(score: str, kind: str) -> str:
    """Name an artifact: the p of the only score of a quantity is ``p``, as in RidgeProbe."""
    return "p" if (score, kind) == ("r2", "_p") else score + kind


def written(*scores: str) -> dict[str, str]:
    """Name what a probe with these scores writes, and the dimensions."""
    keys = [key_of(score, kind) for score in scores for kind in _KINDS]
    classes = () if scores == ("r2",) else ("classes",)
    return dict.fromkeys((*keys, *classes, "reason", "null_reason"), "layer target")


@dataclass(frozen=True)
class Split:
    """How a fit is made.

    Args:
        folds: fold of each row, ``[n]``.
        fitted: the folds to predict from all others, ``[f]``.
        classes: number of classes; 0 for a quantity.
        seed: of fits that draw random numbers.
    """

    folds: Tensor
    fitted: Tensor
    classes: int
    seed: int


@dataclass(frozen=True)
class FoldedProbe(LayerProbe):
    """A read-out of every layer that is fitted to all folds but one and scored on that one.

    A subclass says how one fit is made (:meth:`_fit`) and which scores it has (:meth:`_names`).

    Args:
        layers: paths, patterns, module classes or predicates; ``"**"`` is every leaf module, before and after
            activations alike.
        target: what is predicted: a key of the batch, a key with a feature index (``("observation", 5)``), a function
            of the batch, a list of these, or a mapping of names to these.
        folds: number of folds; each trajectory lies in one. Fewer trajectories than folds: leave one out. Without
            trajectories rows count as independent.
        shifts: circular shifts behind the null; 39 give a one-sided test at 5 % (the null is the 38th of 39), 19 are
            the fewest that do.

    Writes:
        Each score [layer, target]: mean over folds. ``_pooled``: of all held-out rows together. ``_observation``,
        ``_initial``: the same probe on the raw input and on the network at initialisation, NaN where their features
        are not finite or not known. ``_null``: what shifts reach; ``_p`` (``p`` for R²): share of shifts that score
        at least as well, itself counted. ``reason``, ``null_reason``: why a NaN (see ``legend``).
    """

    shifts: int = 39

    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "reason": {
            0: "scored",
            1: "the target is constant, or has one class",
            2: "no fold holds out more than one value of the target, or leaves every class to train on",
            3: "there is one trajectory, so none can be held out",
            4: "the activations are not finite",
            5: "the target is not finite",
            6: "the fit did not converge, or what it predicts is not finite",
            7: "scored, without the folds that lack a class or in which the target is constant",
            8: "the layer gives more features or rows than can be solved",
        },
        "null_reason": {
            0: "scored",
            1: "the score itself is NaN",
            2: "rows are not whole trajectories in time order",
            3: "no shifts were asked for",
            4: "a fit to a shifted target did not converge, or what it predicts is not finite",
        },
    }

    @abstractmethod
    def _names(self) -> tuple[str, ...]:
        """The scores, the one that chooses among variants first."""

    @abstractmethod
    def _fit(self, x: Tensor, y: Tensor, split: Split) -> Callable[[Tensor], Predicted]:
        """Fit a layer to targets side by side.

        Args:
            x: activations of the training rows, ``[n, ...]``, float64.
            y: ``[n, t]``, float64: quantities, or the numbers of classes, each of which has a row.
            split: number of classes, seed.

        Returns:
            What predicts further rows: each target, and within each its variants, side by side.
        """

    def _variants(self) -> int:
        """In how many ways each target is fitted; the score is the best of them, for data and shifts alike."""
        return 1

    def _too_large(self, x: Tensor) -> bool:  # noqa: ARG002 - subclasses that need much memory use it
        """Whether the activations of a layer, ``[n, ...]``, are more than can be solved."""
        return False

    def _seed(self, generator: torch.Generator) -> int:  # noqa: ARG002 - subclasses that draw use it
        """The seed of fits that draw random numbers."""
        return 0

    def _beside(self, blocks: Sequence[Tensor], targets: FoldedTargets, found: Fits) -> dict[str, Tensor]:  # noqa: ARG002
        """What else is written, from all layers, the targets and what was found."""
        return {"classes": targets.classes.expand(len(blocks), -1).clone()} if self._tells_classes else {}

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Layers, targets and, where there are any, the classes of each target."""
        labels = super().labels(seen, model)
        if self._tells_classes:
            classes = [classes_of(name, value, type(self).__name__) for name, value in self._read(seen).items()]
            labels["target_classes"] = [", ".join(map(str, own.tolist())) for own in classes]
        return labels

    @property
    def _tells_classes(self) -> bool:
        return self._names() != ("r2",)

    def _read(self, seen: Seen) -> dict[str, Tensor]:
        return columns(seen.batch, named(self.target), len(seen.batch))

    def _held_out(self, name: str, x: Tensor, y: Tensor, split: Split) -> Predicted:  # noqa: ARG002 - for errors
        """Predict every fold from the others, rows of folds that are not fitted left at zero, on the CPU."""
        x, y, out = x.detach().double(), y.to(x.device), None
        for fold in split.fitted.nonzero()[:, 0].tolist():
            held = split.folds == fold
            there = held.to(x.device)
            says = self._fit(x[~there], y[~there], split)(x[there])
            out = empty(len(x), says) if out is None else out
            out.put(held, says)
        assert out is not None  # a target without a fold is not asked for
        return out

    def _scores(self, parts: Parts) -> Measured:
        seen = next(iter(parts.values())).seen
        rows = len(seen.batch)
        blocks = self._blocks(parts, rows)
        groups = self._groups(seen, rows)
        folds = self._folds(seen, rows) if (groups != groups[0]).any() else None
        targets = FoldedTargets.of(self._read(seen), folds, type(self).__name__ if self._tells_classes else "")
        generator = torch.Generator().manual_seed(0) if seen.generator is None else seen.generator
        why_no_null = self._no_null(seen, self.shifts)
        shifts = None if why_no_null or folds is None else circular_shifts(groups, self.shifts, generator)
        sites = [f"layer {site!r}" for part in parts.values() for site in self.scored(part.model)]
        found = Fits(self, blocks, targets).solve(sites, shifts, self._seed(generator))
        raw, initial = self._spread(self._baselines(parts, targets), parts)
        null, p, null_reason = found.test(why_no_null)
        kinds = (found.mean, found.pooled, raw, initial, null, p)
        values = {
            key_of(score, kind): value[i].clone()
            for i, score in enumerate(self._names())
            for kind, value in zip(_KINDS, kinds, strict=True)
        }
        values |= {"reason": found.reason, "null_reason": null_reason, **self._beside(blocks, targets, found)}
        return Measured(dict(values), {key: tuple(self.writes[key].split()) for key in values})

    def _baselines(self, parts: Parts, targets: FoldedTargets) -> Tensor:
        """Score the raw inputs and the initial networks, once for the same targets: ``[score, block, target]``."""

        def score(blocks: list[Tensor]) -> Tensor:
            names = ["the raw input"] * len(parts) + ["a layer of the initial network"] * (len(blocks) - len(parts))
            return Fits(self, blocks, targets).solve(names, None, 0).mean

        return self._remembered(parts, targets.y, score)


class Fits:
    """Scores of many blocks on many targets; what cannot be scored is NaN, and ``reason`` says why."""

    def __init__(self, probe: FoldedProbe, blocks: Sequence[Tensor], targets: FoldedTargets) -> None:
        self._probe, self._blocks, self._targets = probe, blocks, targets
        shape = len(probe._names()), len(blocks), len(targets.classes)
        self.mean = torch.full(shape, torch.nan, dtype=torch.float64)
        self.pooled = self.mean.clone()
        self.shifted: Tensor | None = None  # [score, block, target, shift]
        self.variant = torch.zeros(shape[1:], dtype=torch.int64)  # which was best
        of_layer = torch.tensor([self._why_not(block) for block in blocks], dtype=torch.int8)
        self._usable = (of_layer == 0).nonzero()[:, 0]
        possible = was_scored(targets.reason) & (of_layer != 0)[:, None]
        self.reason = torch.where(possible, of_layer[:, None], targets.reason)

    def _why_not(self, block: Tensor) -> int:
        return 4 if not block.isfinite().all() else 8 if self._probe._too_large(block) else 0

    def solve(self, names: Sequence[str], shifts: Tensor | None, seed: int) -> Fits:
        """Fit and score the targets, and the targets shifted."""
        count = 0 if shifts is None else len(shifts)
        if shifts is not None:
            self.shifted = torch.full((*self.mean.shape, count), torch.nan, dtype=torch.float64)
        for first, group in self._targets.alike():
            y, folds, k = self._targets.y[:, group], self._targets.folds, int(self._targets.classes[first])
            assert folds is not None  # then no target could be scored
            split = Split(folds, self._targets.fitted[:, first], k, seed)
            wide = y[:, :, None] if shifts is None else torch.cat([y[None], y[shifts]]).permute(1, 2, 0)
            at_once = max(1, _NUMBERS // (wide.numel() * max(1, k) * self._probe._variants()))
            for some in self._usable.split(at_once) if len(self._usable) else ():
                said = [self._probe._held_out(names[i], self._blocks[i], wide.flatten(1), split) for i in some.tolist()]
                self._score(torch.meshgrid(some, torch.tensor(group), indexing="ij"), stacked(said), wide, split)
        return self

    def _score(self, place: tuple[Tensor, ...], said: Predicted, y: Tensor, split: Split) -> None:
        names, shape = self._probe._names(), (*y.shape[1:], self._probe._variants())  # target, 1 + shift, variant
        truth = y.flatten(1).repeat_interleave(shape[-1], 1)
        finite = said.finite().unflatten(-1, shape).all(-1)  # [block, target, 1 + shift]
        mean = mean_scores(names, said, truth, split.folds, self._targets.used[:, int(place[1][0, 0])])
        mean = torch.where(finite[..., None], mean.unflatten(-1, shape), torch.nan)
        best = mean[:1].nan_to_num(-torch.inf).argmax(-1, keepdim=True)
        self.variant[place] = best[0, :, :, 0, 0]
        mean = mean.gather(-1, best.expand(len(mean), -1, -1, -1, -1))[..., 0]
        own = torch.arange(truth.shape[1]).view(shape)[:, 0].flatten()  # shifts need no more than the mean
        pooled = scores_of(names, said.of_targets(own), truth[:, own], split.fitted[split.folds])
        pooled = pooled.unflatten(-1, (shape[0], -1)).gather(-1, best[:, :, :, 0].expand(len(pooled), -1, -1, -1))[
            ..., 0
        ]
        self.mean[:, place[0], place[1]] = mean[..., 0]
        self.pooled[:, place[0], place[1]] = torch.where(finite[..., 0], pooled, torch.nan)
        self.reason[place] = torch.where(finite[..., 0], self.reason[place], 6).to(torch.int8)
        if self.shifted is not None:
            self.shifted[:, place[0], place[1]] = mean[..., 1:]

    def test(self, why_not: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the null of each score, p and why they are NaN: ``[score, block, target]`` twice, the last once."""
        missing = ~was_scored(self.reason)
        lost = missing if self.shifted is None else self.shifted[0].isnan().any(-1)
        sign = torch.tensor([-1.0 if name == "log_loss" else 1.0 for name in self._probe._names()]).double()
        return against_shifts(self.mean, self.shifted, sign, (missing, lost), why_not)
