"""Cross-validated logistic regression by Newton's method, many feature blocks, folds and targets at once.

The loss of a fit is Σ log-loss over its training rows + ‖w‖² / 2C. Blocks are zero-padded to a common width, which
changes nothing: the penalty holds the weights of a column of zeros at zero. The rows lie in parts, and a fit trains on
some of the parts: all but one (cross-validation), those before one (prefixes), all. The fit to all rows gives every
other a start and, as the sum of what its parts add, a first Hessian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tdhook_train.ops.newton import EXACT, NEAR, ROUGH, START, LogisticProblem, factor_of, solve

__all__ = ["Fit", "LogisticDesign"]


@dataclass(frozen=True)
class Fit:
    """What was fitted for ``b`` blocks, ``f`` fits, ``t`` targets and ``s`` shifts.

    Args:
        held_out: logits of the rows of each part from the fit of its number, ``[b, n, t, s, k]``, rows as they were
            given; k is 1 for two classes (the logit of the second), otherwise the number of classes.
        weights: ``[b, f, t, s, k, d]``, on the features as they were given.
        intercepts: ``[b, f, t, s, k]``.
        fitted: ``[f, t]``: whether the training rows of a fit hold every class; otherwise nothing is fitted.
        converged: ``[b, f, t, s]``, true where nothing is fitted.
    """

    held_out: Tensor
    weights: Tensor
    intercepts: Tensor
    fitted: Tensor
    converged: Tensor


class LogisticDesign:
    """Feature blocks, ready to be fitted to any number of targets.

    Args:
        blocks: features, each ``[n, width]``.
        folds: part of each row, ``[n]``, every part from 0 to K-1 present.
        c: weight of the loss against ½‖w‖²; the intercept is not penalised.
        trains: which parts each fit trains on, ``[fit, part]``, a fit for each part or more; all parts but its own by
            default.
    """

    def __init__(self, blocks: Sequence[Tensor], folds: Tensor, c: float, trains: Tensor | None = None) -> None:
        device = blocks[0].device
        self.order = torch.argsort(folds, stable=True).to(device)
        self.sizes: list[int] = torch.bincount(folds).tolist()
        shape = len(blocks), max(block.shape[1] for block in blocks)
        self._x = torch.zeros(shape[0], len(folds), shape[1] + 1, dtype=torch.float64, device=device)
        self._mean, self._scale = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        for i, block in enumerate(blocks):
            x = block[self.order].double()
            mean = x.mean(0)
            x -= mean
            scale = x.square().mean(0).sqrt()
            still = scale <= 1e-12 * mean.abs()
            # columns of one size, so that single precision serves for the rough parts; the penalty follows them
            width = block.shape[1]
            self._x[i, :, :width] = x / scale.masked_fill(still, torch.inf)
            self._mean[i, :width], self._scale[i, :width] = mean, scale.masked_fill(still, 0.0)
        self._x[..., -1] = 1
        self._scale[self._scale == 0] = 1
        self._penalty = functional.pad(1 / (c * self._scale.square()), (0, 1))
        in_part = functional.one_hot(folds.to(device)[self.order], len(self.sizes)).double()
        self._trains = (1 - torch.eye(len(self.sizes)) if trains is None else trains).to(in_part)  # [f, part]
        self._train = in_part @ self._trains.T  # [n, f]
        self._single = self._x.float()
        self._gram = torch.stack([x.mT @ x for x in self._single.split(self.sizes, 1)], 1)  # [b, part, d, d]

    def fit(self, y: Tensor, classes: int) -> Fit:
        """Fit every training set of every block to every target, to convergence in float64.

        Args:
            y: number of each row's class, ``[n, t]``, each number from 0 to ``classes`` - 1 present.
            classes: how many classes each of the targets has, 2 or more.
        """
        hot = _one_hot(y[self.order.to(y.device), :, None], classes).to(self._x)
        problem = self._problem(hot)
        # the fit to all rows is a start only, so in float32
        rough = self._problem(hot.float(), all_rows=True)
        start = _intercepts(rough, len(self._x))
        whole, _ = solve(rough, start, factor_of(self._at_rest(rough, self._gram.sum(1, keepdim=True))), START)
        whole = torch.where(whole.isfinite(), whole, start)
        parts = rough.hessians_of_parts(whole, self.sizes).movedim(0, 1)
        factor = factor_of(rough.penalised(self._trained(parts)))  # [b, f, t, ·, ·]
        whole = whole.double().expand(-1, len(self._trains), -1, -1, -1, -1).clone()
        w, distance = solve(problem, whole, factor.double(), EXACT)
        return self._fit(w, problem.fitted, distance < NEAR)

    def fit_shifted(self, y: Tensor, classes: int, shifts: Tensor) -> Fit:
        """Fit targets whose rows were turned within their folds.

        In float32 and to within some thousandths of a nat of the least loss summed over all rows, far below what a
        null distribution resolves. Every shift has the same class counts, and so the same first Hessian.

        Args:
            y: as for :meth:`fit`.
            classes: as for :meth:`fit`.
            shifts: row indices ``[s, n]`` that leave every row in its fold.
        """
        turned = y[shifts[:, self.order.to(shifts.device)].to(y.device)]  # [s, n, t]
        hot = _one_hot(turned.permute(1, 2, 0), classes)
        train = self._trained(self._gram)
        for dtype in (torch.float32, torch.float64):  # where single precision will not do
            problem = self._problem(hot.to(dtype))
            start = _intercepts(problem, len(self._x))
            factor = factor_of(self._at_rest(problem, train.to(start.dtype)))
            w, distance = solve(problem, start, factor, ROUGH)
            near = distance <= ROUGH
            if (near | ~problem.fitted[..., None]).all():
                break
        return self._fit(w, problem.fitted, near)

    def _problem(self, y: Tensor, *, all_rows: bool = False) -> LogisticProblem:
        """Lay out the problems of one-hot classes ``[n, t, s, k]``, in their precision."""
        x, train = self._x_in(y.dtype), self._train.to(y.dtype)
        parts = zip(y.flatten(1).split(self.sizes), x.split(self.sizes, 1), strict=True)
        pull = torch.stack([a.mT @ b for a, b in parts], 1)
        pull = pull.sum(1, keepdim=True) if all_rows else self._trained(pull)
        rows = torch.ones_like(train[:, :1]) if all_rows else train
        counts = torch.einsum("nf,ntk->ftk", rows, y[:, :, 0])
        if y.shape[-1] == 1:
            counts = torch.cat([counts, rows.sum(0)[:, None, None] - counts], -1)
        pull = pull.unflatten(2, y.shape[1:])
        return LogisticProblem(x, y, rows, self._penalty.to(y.dtype), (counts > 0.5).all(-1), pull)

    def _trained(self, parts: Tensor) -> Tensor:
        """Add up what the parts of each fit contribute: ``[b, part, ...]`` to ``[b, f, ...]``."""
        return torch.tensordot(self._trains.to(parts.dtype), parts, ([1], [1])).movedim(0, 1)

    def _x_in(self, dtype: torch.dtype) -> Tensor:
        return self._single if dtype == torch.float32 else self._x

    def _at_rest(self, problem: LogisticProblem, gram: Tensor) -> Tensor:
        """Return the Hessian where every weight is 0, from what the rows of each fold add to ``xᵀx``."""
        p = _shares(problem)
        curve = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]  # [f, t, k, k]
        out = torch.einsum("ftij,bfde->bftidje", curve, gram)
        return problem.penalised(out.flatten(-2).flatten(-3, -2))

    def _fit(self, w: Tensor, fitted: Tensor, near: Tensor) -> Fit:
        x = self._x_in(w.dtype).split(self.sizes, 1)
        logits = [(part @ w[:, i].flatten(1, 3).mT).unflatten(-1, w.shape[2:-1]) for i, part in enumerate(x)]
        held_out = torch.cat(logits, 1)[:, self.order.argsort()]
        weights = w[..., :-1] / self._scale[:, None, None, None, None].to(w.dtype)
        moved = (weights * self._mean[:, None, None, None, None].to(w.dtype)).sum(-1)
        return Fit(held_out, weights, w[..., -1] - moved, fitted, near | ~fitted[..., None])


def _one_hot(y: Tensor, classes: int) -> Tensor:
    return y[..., None] if classes == 2 else functional.one_hot(y, classes)


def _shares(problem: LogisticProblem) -> Tensor:
    """Return the share of each class among the rows that count, ``[f, t, k]``."""
    share = torch.einsum("nf,ntk->ftk", problem.rows, problem.y[:, :, 0]) / problem.rows.sum(0)[:, None, None]
    return share.clamp(1e-6, 1 - 1e-6)


def _intercepts(problem: LogisticProblem, blocks: int) -> Tensor:
    """Return the optimum without features, ``[b, f, t, s, k, d]``."""
    share = _shares(problem)
    f, t, k = share.shape
    w = problem.x.new_zeros(blocks, f, t, problem.y.shape[2], k, problem.x.shape[-1])
    w[..., -1] = (share.logit() if k == 1 else share.log())[None, :, :, None]
    return w
