"""How much of a quantity a linear read-out of each layer recovers, with what a score must be held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel
from tdhook_train.latent.fold_probes import FoldProbes
from tdhook_train.latent.layer_probe import LayerProbe, null_place
from tdhook_train.method import Part, Parts, Seen
from tdhook_train.ops.folds import circular_shifts
from tdhook_train.ops.join import Labels, Measured
from tdhook_train.ops.ridge import RidgeDesign, coefficients, constant
from tdhook_train.ops.targets import columns, named
from tdhook_train.ops.units import padded

__all__ = ["RidgeProbe"]

_MAX_WIDTH = 4096  # the statistics of a block take width² numbers a fold


@dataclass(frozen=True)
class RidgeProbe(LayerProbe):
    """How much of each target a linear read-out of each layer recovers: cross-validated R² of ridge regression.

    All layers are solved together, exactly, from sufficient statistics in float64. A score says nothing alone: beside
    it stand the same probe on the raw input, the same probe on the network at initialisation, and a null from
    circular shifts within trajectories.

    Costs no pass of its own (the shared one; another on the initial network, once a probe set).

    Args:
        layers: paths, patterns, module classes or predicates; ``"**"`` is every leaf module, before and after
            activations alike.
        target: what is predicted: a key of the batch, a key with a feature index (``("observation", 5)``), a function
            of the batch, a list of these, or a mapping of names to these. Outputs of the networks stand in the batch
            too: ``"state_value"`` is the present value estimate.
        folds: number of folds; each trajectory lies in one. Fewer trajectories than folds: leave one out. Without
            trajectories rows count as independent.
        alphas: penalties; the score is the best over them, for the data and for every shift alike.
        shifts: circular shifts behind the null; 39 give a one-sided test at 5 % (the null is the 38th of 39).
        directions: also write what is read out, for :func:`tdhook_train.metrics.direction_cosine`, steering, erasure,
            or to apply the probe elsewhere.

    Writes:
        ``r2`` [layer, target]: R², mean over folds, best penalty. ``r2_pooled``: R² of all held-out rows together, at
        that penalty. ``r2_path`` [layer, target, alpha]. ``alpha``: the best penalty. ``r2_observation``,
        ``r2_initial``, ``r2_null``: the baselines and the null, in the shape of ``r2``; a baseline is NaN where its
        features are not finite, more than 4,096, or not known. ``p``: share of shifts that score at least as much,
        itself counted. ``reason``, ``null_reason``: why a NaN (see ``legend``). With ``directions``, ``direction``
        [layer, target, unit] and ``intercept`` [layer, target]: the fit to all rows at the best penalty, which predicts
        ``x @ direction.mT + intercept``; NaN beyond the layer's width, and where there is no score.

    Source: Alain and Bengio 2016, arXiv:1610.01644; why a score needs a control: Hewitt and Liang 2019,
    arXiv:1909.03368.
    """

    alphas: tuple[float, ...] = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
    shifts: int = 39
    directions: bool = False

    writes: ClassVar[Mapping[str, str]] = {
        "r2_path": "layer target alpha",
        **dict.fromkeys(
            ("r2", "r2_pooled", "alpha", "r2_observation", "r2_initial", "r2_null", "p", "reason", "null_reason"),
            "layer target",
        ),
        "direction": "layer target unit",
        "intercept": "layer target",
    }
    shown: ClassVar[tuple[str, ...]] = ("r2", "r2_observation", "r2_initial", "r2_null")
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "reason": {
            0: "scored",
            1: "the target is constant",
            2: "the target is constant within every fold",
            3: "the target is not finite",
            4: "the activations are not finite",
            5: "the layer gives more features than can be solved",
        },
        "null_reason": {
            0: "scored",
            1: "the score itself is NaN",
            2: "rows are not whole trajectories in time order",
            3: "no shifts were asked for",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alphas", tuple(float(alpha) for alpha in self.alphas))
        if not self.alphas or min(self.alphas) <= 0:
            raise SettingsError(f"RidgeProbe needs positive penalties, got alphas={self.alphas}")

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Layers, targets and penalties."""
        return super().labels(seen, model) | {"alpha": list(self.alphas)}

    def _scores(self, parts: Parts) -> Measured:
        seen = next(iter(parts.values())).seen
        design, folds, y, reason = self._posed(parts)
        usable = torch.where(y.isfinite().all(0), y, torch.zeros_like(y))
        path, pooled_path = design.score(usable)
        path = torch.where((reason == 0)[..., None], path.cpu(), torch.nan)
        best = path.nan_to_num(-torch.inf).argmax(-1, keepdim=True)
        r2 = path.gather(-1, best)[..., 0]
        pooled = torch.where(reason == 0, pooled_path.cpu().gather(-1, best)[..., 0], torch.nan)
        null, p, null_reason = self._null(seen, design, usable, r2)
        values = {
            "r2": r2,
            "r2_pooled": pooled,
            "r2_path": path,
            "alpha": torch.where(reason == 0, torch.tensor(self.alphas, dtype=torch.float64)[best[..., 0]], torch.nan),
            **self._baselines(parts, folds, usable, reason),
            "r2_null": null,
            "p": p,
            "reason": reason,
            "null_reason": null_reason,
        }
        if self.directions:
            fits = [design.coefficients(i, usable, alpha) for i, alpha in enumerate(values["alpha"])]
            values["direction"] = padded([weights for weights, _ in fits]).mT
            values["intercept"] = torch.stack([intercepts for _, intercepts in fits])
        return Measured(dict(values), {key: tuple(self.writes[key].split()) for key in values})

    def fold_probes(self, part: Part) -> FoldProbes:
        """Return the probe of each fold on one network, at the best penalty; the scores are R²."""
        design, folds, y, reason = self._posed({"": part})
        usable = torch.where(y.isfinite().all(0), y, torch.zeros_like(y))
        path = torch.where((reason == 0)[..., None], design.score(usable)[0].cpu(), torch.nan)
        best = path.nan_to_num(-torch.inf).argmax(-1)
        alphas = torch.where(reason == 0, torch.tensor(self.alphas, dtype=torch.float64)[best], torch.nan)
        trains = [folds != fold for fold in range(int(folds.max()) + 1)]
        weights, intercepts = [], []
        for i, alpha in enumerate(alphas):
            fits = [design.coefficients(i, usable, alpha, train) for train in trains]
            weights.append(torch.stack([fit[0].mT for fit in fits], 1))
            intercepts.append(torch.stack([fit[1] for fit in fits], 1))
        score = path.gather(-1, best[..., None])[..., 0]
        return FoldProbes(score, reason, folds, y.cpu(), weights, intercepts)

    def _posed(self, parts: Parts) -> tuple[_Designs, Tensor, Tensor, Tensor]:
        """Return the layers, folds, targets ``[n, target]``, and why something cannot be scored ``[layer, target]``."""
        seen = next(iter(parts.values())).seen
        rows = len(seen.batch)
        blocks = self._blocks(parts, rows)
        targets = columns(seen.batch, named(self.target), rows).values()
        y = torch.stack([column.detach().double() for column in targets], 1).to(blocks[0].device)
        folds = self._folds(seen, rows)
        design = _Designs(blocks, folds, self)
        of_layer = design.reasons[:, None]
        return design, folds, y, torch.where(of_layer > 0, of_layer, _target_reasons(y, folds))

    def _null(self, seen: Seen, design: _Designs, y: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the null score, p and why it is NaN, each ``[layer, target]``."""
        nan = torch.full_like(r2, torch.nan)
        reason = r2.isnan().to(torch.int8)
        if (why := self._no_null(seen, self.shifts)) or seen.groups is None:
            return nan, nan, torch.full_like(reason, why)
        shifts = circular_shifts(seen.groups.cpu(), self.shifts, seen.generator)
        scores = design.score_shifted(y, shifts).cpu()
        null = scores.sort(0).values[null_place(self.shifts)]
        p = (1 + (scores >= r2).sum(0)).double() / (self.shifts + 1)
        scored = reason == 0
        return torch.where(scored, null, torch.nan), torch.where(scored, p, torch.nan), reason

    def _baselines(self, parts: Parts, folds: Tensor, y: Tensor, reason: Tensor) -> dict[str, Tensor]:
        """Score the raw inputs and the initial network, factorised once a probe set."""
        memo = next(iter(parts.values())).seen.memo
        if "baselines" not in memo:
            raw_blocks, initial_blocks = self._baseline_blocks(parts)
            memo["baselines"] = _Designs(raw_blocks + initial_blocks, folds, self)
        of_layer = torch.tensor([0, 4, 5], dtype=torch.int8)  # reasons that say nothing of the target
        usable = torch.isin(reason, of_layer)
        raw, initial = self._spread(memo["baselines"].best(y), parts)
        out = {"r2_observation": raw, "r2_initial": initial}
        return {name: torch.where(usable, score, torch.nan) for name, score in out.items()}


class _Designs:
    """Designs of many blocks: those of like width padded to one and solved in one batch.

    A block that cannot be solved is put out of the way; ``reasons`` says why, by the probe's legend.
    """

    def __init__(self, blocks: Sequence[Tensor], folds: Tensor, probe: RidgeProbe) -> None:
        finite = torch.stack([block.sum() for block in blocks]).isfinite().cpu()  # NaN and infinity survive a sum
        narrow = torch.tensor([block.shape[1] <= _MAX_WIDTH for block in blocks])
        self.reasons = torch.where(narrow, torch.where(finite, 0, 4), 5).to(torch.int8)
        solved = [b if not why else b.new_zeros(len(b), 1) for b, why in zip(blocks, self.reasons, strict=True)]
        self._blocks, self._widths = solved, [block.shape[1] for block in blocks]
        batches: dict[int, list[int]] = {}
        for i, block in enumerate(solved):
            batches.setdefault(max(64, 1 << (block.shape[1] - 1).bit_length()), []).append(i)
        self._batches = [
            (index, RidgeDesign([solved[i] for i in index], folds, probe.alphas)) for index in batches.values()
        ]

    def score(self, y: Tensor) -> tuple[Tensor, Tensor]:
        scores = [design.score(y) for _, design in self._batches]
        return self._in_order([s[0] for s in scores], 0), self._in_order([s[1] for s in scores], 0)

    def score_shifted(self, y: Tensor, shifts: Tensor) -> Tensor:
        return self._in_order([design.score_shifted(y, shifts) for _, design in self._batches], 1)

    def best(self, y: Tensor) -> Tensor:
        """R² averaged over folds at the best penalty, NaN for a block that was not solved: ``[block, target]``."""
        return torch.where(self.reasons[:, None] == 0, self.score(y)[0].amax(-1).cpu(), torch.nan)

    def coefficients(self, block: int, y: Tensor, alphas: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the weights, ``[width, target]``, and intercepts of a fit to some rows; NaN where there is none."""
        x = self._blocks[block]
        rows = torch.ones(len(x), dtype=torch.bool) if rows is None else rows
        weights, intercepts = coefficients(x[rows.to(x.device)], y[rows.to(y.device)], alphas)
        return functional.pad(weights, (0, 0, 0, self._widths[block] - len(weights)), value=torch.nan), intercepts

    def _in_order(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        place = torch.tensor([i for index, _ in self._batches for i in index]).argsort()
        return torch.cat(list(parts), axis).index_select(axis, place.to(parts[0].device))


def _target_reasons(y: Tensor, folds: Tensor) -> Tensor:
    """Say for each target why it cannot be scored, 0 where it can: ``[target]``."""
    y = y.cpu()
    in_folds = torch.stack([constant(y[folds == k]) for k in range(int(folds.max()) + 1)]).all(0)
    reasons = torch.where(in_folds, 2, 0)
    reasons[constant(y)] = 1
    reasons[~y.isfinite().all(0)] = 3
    return reasons.to(torch.int8)
