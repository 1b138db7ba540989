"""Logistic probes of many layers and targets: their scores on rows held out, under shifts too, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tdhook_train.latent.class_blocks import NUMBERS, ClassBlocks
from tdhook_train.latent.layer_probe import against_shifts
from tdhook_train.ops.classification import fold_scores, pooled_scores
from tdhook_train.ops.logistic import Fit, LogisticDesign

__all__ = ["LogisticScores"]

_BIGGER_IS_BETTER = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)  # of SCORES


class LogisticScores(ClassBlocks):
    """Scores of many blocks on many targets.

    What cannot be solved is put out of the way; ``reason`` says why, by the legend of ``LogisticProbe``.

    Args:
        blocks: features, each ``[n, width]``.
        y: number of each row's class, ``[n, target]``.
        classes: how many each target has, ``[target]``.
        folds: fold of each row, ``[n]``; None where nothing can be held out.
        c: weight of the loss against ½‖w‖².

    Attributes:
        mean: of ``SCORES``, over folds, ``[3, block, target]``.
        pooled: of all rows held out, likewise.
        shifted: of shifted targets, ``[3, block, target, shift]``, where there are any.
        weights: where they are kept, ``[target, fit, class, width]`` a block: a logit a class, of two classes 0 and the
            logit of the second; NaN beyond the classes of a target and where there is no score.
        intercepts: ``[target, fit, class]`` a block, of logits that are 0 on average over classes if more than two.
    """

    def __init__(self, blocks: Sequence[Tensor], y: Tensor, classes: Tensor, folds: Tensor | None, c: float) -> None:
        super().__init__(blocks, y, classes)
        self._folds, self._c = folds, c
        shape = 3, len(blocks), y.shape[1]
        self.mean = torch.full(shape, torch.nan, dtype=torch.float64)
        self.pooled = self.mean.clone()
        self.shifted: Tensor | None = None
        self.weights: list[Tensor] = []
        self.intercepts: list[Tensor] = []
        self._lost = torch.zeros(shape[1:], dtype=torch.bool)  # shifts that did not converge
        if folds is None:
            self.reason[:] = 3

    @property
    def _fold_count(self) -> int:
        return 1 if self._folds is None else int(self._folds.max()) + 1

    def solve(self, shifts: Tensor | None, keep: Literal["nothing", "folds", "whole"] = "nothing") -> LogisticScores:
        """Fit and score the targets, and the targets shifted.

        Args:
            shifts: row indices ``[shift, n]`` that leave every row in its fold.
            keep: whose weights: of no fit, of those of the folds, or of one to all rows.
        """
        if shifts is not None:
            self.shifted = torch.full((*self.mean.shape, len(shifts)), torch.nan, dtype=torch.float64)
        if keep != "nothing":
            self._make_room(self._fold_count if keep == "folds" else 1)
        if self._folds is None:
            return self
        trains = 1 - torch.eye(self._fold_count)
        trains = torch.cat([trains, torch.ones_like(trains[:1])]) if keep == "whole" else trains
        for k, of_k, some in self.batches(len(trains)):
            design = LogisticDesign([self.blocks[i] for i in some], self._folds, self._c, trains)
            size = len(some) * len(self.y) * (k if k > 2 else 1) * (1 if shifts is None else len(shifts))
            for targets in of_k.split(max(1, NUMBERS // size)):
                self._solve(design, some, targets, shifts)
        return self

    def test(self, why_not: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the null of each score, p and why they are NaN: ``[3, block, target]`` twice, ``[block, target]``."""
        missing = self.mean[0].isnan()
        return against_shifts(self.mean, self.shifted, _BIGGER_IS_BETTER, (missing, self._lost), why_not)

    def _make_room(self, fits: int) -> None:
        targets, most = len(self.classes), max(2, int(self.classes.max()))
        for block in self.blocks:
            self.weights.append(torch.full((targets, fits, most, block.shape[1]), torch.nan, dtype=torch.float64))
            self.intercepts.append(torch.full((targets, fits, most), torch.nan, dtype=torch.float64))

    def _solve(self, design: LogisticDesign, some: list[int], targets: Tensor, shifts: Tensor | None) -> None:
        folds, place = self._folds, (torch.tensor(some)[:, None], targets)
        if folds is None:  # then no block is left to solve
            return
        k, parts = int(self.classes[targets[0]]), slice(self._fold_count)
        y = self.y[:, targets].to(self.blocks[0].device)
        fit = design.fit(y, k)
        held_out = fit.held_out, y[..., None], folds, fit.fitted[parts]
        mean, used = (value.cpu() for value in fold_scores(*held_out))
        pooled = pooled_scores(*held_out).cpu()
        failed = ~fit.converged[:, parts].all(3).all(1).cpu()
        reason = torch.where(used.all(0), 0, torch.where(used.any(0), 7, 2)).expand_as(failed)
        reason = torch.where(failed, 6, reason).to(torch.int8)
        scored = torch.isin(reason, torch.tensor([0, 7], dtype=torch.int8))
        self.reason[place] = reason
        self.mean[:, place[0], place[1]] = torch.where(scored, mean[..., 0], torch.nan)
        self.pooled[:, place[0], place[1]] = torch.where(scored, pooled[..., 0], torch.nan)
        if self.weights:
            self._keep(fit, some, targets, scored)
        if shifts is not None and self.shifted is not None:
            fit = design.fit_shifted(y, k, shifts)
            turned = y[shifts.to(y.device)].permute(1, 2, 0)
            scores = fold_scores(fit.held_out, turned, folds, fit.fitted[parts])[0].cpu()
            self.shifted[:, place[0], place[1]] = torch.where(scored[..., None], scores, torch.nan)
            self._lost[place] = ~fit.converged[:, parts].all(3).all(1).cpu()

    def _keep(self, fit: Fit, some: list[int], targets: Tensor, scored: Tensor) -> None:
        """Keep the weights of the last fits, as many as there is room for."""
        fits = slice(-self.weights[0].shape[1], None)
        weights, intercepts = fit.weights[:, fits, :, 0], fit.intercepts[:, fits, :, 0]  # [b, f, t, k(, d)]
        if weights.shape[3] == 1:
            weights = torch.cat([torch.zeros_like(weights), weights], 3)
            intercepts = torch.cat([torch.zeros_like(intercepts), intercepts], 3)
        else:
            intercepts = intercepts - intercepts.mean(3, keepdim=True)  # their sum is free
        kept = fit.fitted[None, fits].cpu() & fit.converged[:, fits].all(3).cpu() & scored[:, None]  # [b, f, t]
        for i, block in enumerate(some):
            own = torch.where(kept[i, ..., None, None], weights[i].cpu(), torch.nan)[..., : self.blocks[block].shape[1]]
            self.weights[block][targets, :, : own.shape[2]] = own.transpose(0, 1)
            own = torch.where(kept[i, ..., None], intercepts[i].cpu(), torch.nan)
            self.intercepts[block][targets, :, : own.shape[2]] = own.transpose(0, 1)
