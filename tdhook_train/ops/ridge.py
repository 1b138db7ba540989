"""Cross-validated ridge regression from sufficient statistics, many feature blocks and targets at once.

Statistics of each fold (n, Σx, Σy, XᵀX, XᵀY, ΣY²) are computed once in float64; those of its training rows are the
total less the fold; one symmetric eigendecomposition a fold and block serves every penalty; R² follows from the
statistics alone. Blocks are zero-padded to a common width, which changes nothing: a column of zeros has no
covariance with anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["RidgeDesign"]


@dataclass(frozen=True)
class _Moments:
    """Of the targets, fold by fold, about their overall mean; ``[fold, target]`` unless said otherwise."""

    total: Tensor  # Σy
    train_mean: Tensor  # mean of the rows outside the fold
    test: Tensor  # Σ(y - train_mean)² in the fold
    spread: Tensor  # Σ(y - fold mean)² in the fold
    overall: Tensor  # Σy² over all rows, [target]


class RidgeDesign:
    """Feature blocks, factorised for every fold: made once, scored against any number of targets.

    Args:
        blocks: features, each ``[n, width]``.
        folds: fold of each row, ``[n]``, every fold from 0 to K-1 present.
        alphas: penalties on the squared norm of the weights; the intercept is not penalised.
    """

    def __init__(self, blocks: Sequence[Tensor], folds: Tensor, alphas: Sequence[float]) -> None:
        self.order = torch.argsort(folds, stable=True)
        self.sizes: list[int] = torch.bincount(folds).tolist()
        self.alphas = tuple(alphas)
        self.blocks = len(blocks)
        device = blocks[0].device
        self._order = self.order.to(device)
        self._x = _centred(_side_by_side(blocks, self._order))  # [n, block, width]
        n = torch.tensor(self.sizes, dtype=torch.float64, device=device)[:, None, None]  # [fold, 1, 1]
        self._n, self._n_train = n, n.sum() - n
        self._factorise()

    def _factorise(self) -> None:
        parts = self._x.split(self.sizes)
        gram = torch.stack([part.permute(1, 2, 0) @ part.permute(1, 0, 2) for part in parts])  # [fold, block, d, d]
        self._total = torch.stack([part.sum(0) for part in parts])  # [fold, block, d]
        self._mean = (self._total.sum(0) - self._total) / self._n_train  # of the training rows
        outer = _outer(self._mean, self._mean)
        train = gram.sum(0) - gram - self._n_train[..., None] * outer
        cross = _outer(self._total, self._mean)
        test = gram - cross - cross.mT + self._n[..., None] * outer
        self._values, self._vectors = torch.linalg.eigh(train)
        self._test = self._vectors.mT @ test @ self._vectors

    def score(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Score every block on every target at every penalty.

        Args:
            y: targets, ``[n, target]``, float64.

        Returns:
            R² averaged over folds and R² pooled over all held-out rows, both ``[block, target, alpha]``. Folds in
            which a target does not vary are left out of the average; NaN where no fold is left.
        """
        y = (y - y.mean(0))[self._order]
        moments = self._moments(y)
        errors = self._errors(self._x, y, moments, torch.float64)  # [alpha, fold, block, target]
        return self._averaged(errors, moments), (1 - errors.sum(1) / moments.overall).permute(1, 2, 0)

    def score_shifted(self, y: Tensor, shifts: Tensor) -> Tensor:
        """Score targets whose rows were turned within their folds, taking the best penalty for each.

        In float32, whose error in R² (1e-7) is far below what a null distribution resolves.

        Args:
            y: targets, ``[n, target]``, float64.
            shifts: row indices ``[shift, n]`` that leave every row in its fold.

        Returns:
            R² averaged over folds, the best over penalties, ``[shift, block, target]``.
        """
        y = y - y.mean(0)
        moments = self._moments(y[self._order])  # sums over folds: the same for every shift
        count, width = shifts.shape[0], y.shape[1]
        turned = y.float()[shifts[:, self.order].to(y.device)].permute(1, 0, 2).reshape(len(y), count * width)
        wide = _Moments(*(_tile(part, count).float() for part in vars(moments).values()))
        errors = self._errors(self._x.float(), turned, wide, torch.float32)
        best = self._averaged(errors, wide).amax(-1)
        return best.reshape(self.blocks, count, width).transpose(0, 1).double()

    def _moments(self, y: Tensor) -> _Moments:
        parts = y.split(self.sizes)
        n, n_train = self._n[..., 0], self._n_train[..., 0]
        total = torch.stack([part.sum(0) for part in parts])
        squares = torch.stack([part.square().sum(0) for part in parts])
        mean = (total.sum(0) - total) / n_train
        test = squares - 2 * total * mean + n * mean.square()
        # about each fold's own mean, from the rows: squares - total²/n would cancel
        spread = torch.stack([(part - part.mean(0)).square().sum(0) for part in parts])
        return _Moments(total, mean, test, spread, squares.sum(0))

    def _errors(self, x: Tensor, y: Tensor, moments: _Moments, dtype: torch.dtype) -> Tensor:
        """Sum of squared errors on each fold of the fit to the others, ``[alpha, fold, block, target]``.

        Targets before features throughout, so that sums over features run along memory.
        """
        parts = zip(x.flatten(1).split(self.sizes), y.split(self.sizes), strict=True)
        products = [(b.T @ a).view(-1, *x.shape[1:]).transpose(0, 1) for a, b in parts]  # YᵀX, [block, target, d]
        train, test = self._rotated(torch.stack(products), moments, dtype)
        values, gram = self._values.to(dtype).flatten(0, 1)[:, None, :], self._test.to(dtype).flatten(0, 1)
        errors = []
        for alpha in self.alphas:
            weights = train * (values + alpha).reciprocal()
            # wᵀGw - 2wᵀt, as the sum over w ∘ (Gw - 2t)
            errors.append(torch.baddbmm(test, weights, gram, beta=-2).mul_(weights).sum(-1))
        folded = torch.stack(errors).unflatten(1, (len(self.sizes), self.blocks))
        return folded + moments.test[:, None, :]

    def _rotated(self, products: Tensor, moments: _Moments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Covariances of targets and features in the eigenbasis, of the training rows and of the held-out ones.

        Both about the means of the training rows, ``[fold * block, target, d]``.
        """
        to_basis = self._vectors.to(dtype).flatten(0, 1)
        each = partial(torch.repeat_interleave, repeats=self.blocks, dim=0)  # [fold, ...] -> [fold * block, ...]
        n, n_train = each(self._n[:, 0].to(dtype)), each(self._n_train[:, 0].to(dtype))  # [fold * block, 1]
        mean_y, total_y = each(moments.train_mean), each(moments.total)
        mean, total = (part.to(dtype).flatten(0, 1)[:, None, :] @ to_basis for part in (self._mean, self._total))
        test = products.flatten(0, 1) @ to_basis
        train = (products.sum(0).repeat(len(self.sizes), 1, 1) @ to_basis).sub_(test)
        train.baddbmm_((n_train * mean_y)[..., None], mean, alpha=-1)
        # Σ(y - m_y)(x - m) = Σyx - m_y·Σx - (Σy - n·m_y)·m
        left, right = torch.stack([mean_y, total_y - n * mean_y], -1), torch.cat([total, mean], 1)
        return train, test.baddbmm_(left, right, alpha=-1)

    def _averaged(self, errors: Tensor, moments: _Moments) -> Tensor:
        varies = moments.spread > 0
        r2 = 1 - errors / torch.where(varies, moments.spread, torch.nan)[:, None, :]
        return r2.nanmean(1).permute(1, 2, 0)


def _side_by_side(blocks: Sequence[Tensor], order: Tensor) -> Tensor:
    """Gather the rows of each block in order, zero-padded to one width: ``[n, block, width]``."""
    width = max(block.shape[1] for block in blocks)
    return torch.stack([functional.pad(block, (0, width - block.shape[1])) for block in blocks], 1)[order]


def _centred(x: Tensor) -> Tensor:
    # float64 before the mean is taken off: in float32 the centring alone is off by 4e-10
    x = x.to(torch.float64, copy=True)
    return x.sub_(x.mean(0))


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _tile(part: Tensor, count: int) -> Tensor:
    return part.repeat(*[1] * (part.ndim - 1), count)
