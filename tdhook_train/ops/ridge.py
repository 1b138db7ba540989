"""Cross-validated ridge regression from sufficient statistics, many feature blocks and targets at once.

Statistics of each fold (n, Σx, Σy, XᵀX, XᵀY, ΣY²) are computed once in float64; those of its training rows are the
total less the fold; one symmetric eigendecomposition a fold and block serves every penalty; R² follows from the
statistics alone. Blocks are zero-padded to a common width, which changes nothing: a column of zeros has no
covariance with anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["RidgeDesign", "coefficients", "constant"]

_CACHED = 1 << 18  # numbers worked on at a time: what stays in a core's cache, measured fastest


@dataclass(frozen=True)
class _Moments:
    """Of the targets, fold by fold, about their overall mean: ``[fold, target]``."""

    total: Tensor  # Σy
    train_mean: Tensor  # mean of the rows outside the fold
    test: Tensor  # Σ(y - train_mean)² in the fold
    spread: Tensor  # Σ(y - fold mean)² in the fold


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
        self._x = _centred(_by_fold(blocks, self._order.split(self.sizes)))  # [n of the fold, block, width] a fold
        n = torch.tensor(self.sizes, dtype=torch.float64, device=device)[:, None, None]  # [fold, 1, 1]
        self._n, self._n_train = n, n.sum() - n
        self._factorise()

    def _factorise(self) -> None:
        gram = torch.stack([x.permute(1, 2, 0) @ x.permute(1, 0, 2) for x in self._x])  # [fold, block, d, d]
        self._total = torch.stack([x.sum(0) for x in self._x])  # [fold, block, d]
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
        shares, errors = self._errors(y, self._moments(y))
        overall = y.square().sum(0)
        return _path(1 - shares), _path(1 - errors / overall)

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
        shares, _ = self._errors(turned, wide)
        return (1 - shares.amin(0)).reshape(self.blocks, count, width).transpose(0, 1).double()

    def _moments(self, y: Tensor) -> _Moments:
        parts = y.split(self.sizes)
        n, n_train = self._n[..., 0], self._n_train[..., 0]
        total = torch.stack([part.sum(0) for part in parts])
        squares = torch.stack([part.square().sum(0) for part in parts])
        mean = (total.sum(0) - total) / n_train
        test = squares - 2 * total * mean + n * mean.square()
        # about each fold's own mean, from the rows: squares - total²/n would cancel
        spread = torch.stack([torch.where(constant(part), 0, (part - part.mean(0)).square().sum(0)) for part in parts])
        return _Moments(total, mean, test, spread)

    def _errors(self, y: Tensor, moments: _Moments) -> tuple[Tensor, Tensor]:
        """Fit to all folds but one, predict that one: what is left unexplained, ``[alpha, block, target]``.

        In the precision of ``y``, and as many folds at a time as a cache holds; targets before features, so that sums
        over features run along memory.

        Returns:
            The unexplained share of a fold's variance, averaged over the folds in which the target varies, and the
            squared error summed over all folds.
        """
        parts = zip(self._x, y.split(self.sizes), strict=True)
        # what targets and features have in common: fold, block, target, d
        products = torch.stack(
            [(b.T @ x.flatten(1).to(y.dtype)).view(-1, *x.shape[1:]).transpose(0, 1) for x, b in parts]
        )
        whole = products.sum(0)
        varies = moments.spread > 0
        weight = torch.where(varies, 1 / moments.spread, 0) / varies.sum(0)  # 0 / 0 where it varies in no fold
        shares = errors = torch.zeros((), dtype=y.dtype, device=y.device)
        for folds in torch.arange(len(products)).split(max(1, _CACHED // products[0].numel())):
            some = slice(int(folds[0]), int(folds[-1]) + 1)
            error = self._fold_errors(some, products[some], whole, moments)  # [alpha, fold, block, target]
            shares, errors = shares + (error * weight[some, None]).sum(1), errors + error.sum(1)
        return shares, errors

    def _fold_errors(self, some: slice, held_out: Tensor, whole: Tensor, moments: _Moments) -> Tensor:
        """Squared errors on some folds, ``[alpha, fold, block, target]``."""
        dtype = whole.dtype
        vectors, values, gram = (x[some].to(dtype) for x in (self._vectors, self._values, self._test))
        n, n_train = (x[some, ..., None].to(dtype) for x in (self._n, self._n_train))
        mean_y, total_y = (x[some, None, :, None] for x in (moments.train_mean, moments.total))  # [fold, 1, target, 1]
        mean, total = (
            x[some].to(dtype)[..., None, :] @ vectors for x in (self._mean, self._total)
        )  # [.., block, 1, d]
        # covariances of targets and features in the eigenbasis, about the means of the training rows
        test = held_out @ vectors
        train = (whole @ vectors).sub_(test).addcmul_(n_train * mean_y, mean, value=-1)
        # Σ(y - m_y)(x - m) = Σyx - m_y·Σx - (Σy - n·m_y)·m
        test.addcmul_(mean_y, total, value=-1).addcmul_(total_y - n * mean_y, mean, value=-1)
        inverse = 1 / (values[..., None, :] + values.new_tensor(self.alphas)[:, None])  # [fold, block, alpha, d]
        errors = []
        for steep in inverse.split(max(1, _CACHED // train.numel()), dim=2):
            weights = train[:, :, None] * steep[..., None, :]  # [fold, block, alpha, target, d]
            # wᵀGw - 2wᵀt, as the sum over w ∘ (Gw - 2t)
            slopes = (weights.flatten(2, 3) @ gram).view_as(weights).sub_(test[:, :, None], alpha=2)
            errors.append(slopes.mul_(weights).sum(-1))
        return torch.cat(errors, 2).movedim(2, 0) + moments.test[some, None]


def coefficients(x: Tensor, y: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
    """Fit every target to all rows, each at its own penalty.

    Args:
        x: features, ``[n, width]``.
        y: targets, ``[n, target]``, float64.
        alphas: ``[target]``; NaN gives NaN.

    Returns:
        Weights, ``[width, target]``, and intercepts, ``[target]``, float64, on the CPU.
    """
    mean, x = x.double().mean(0), x.double() - x.double().mean(0)
    values, vectors = torch.linalg.eigh(x.mT @ x)
    along = vectors.mT @ (x.mT @ (y - y.mean(0)))
    weights = vectors @ (along / (values.clamp(min=0)[:, None] + alphas.to(x)))
    return weights.cpu(), (y.mean(0) - mean @ weights).cpu()


def constant(y: Tensor) -> Tensor:
    """Whether each column is one number throughout; a spread below rounding is rounding."""
    return y.amax(0) - y.amin(0) <= 1e-12 * y.abs().amax(0)


def _by_fold(blocks: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """Gather the rows of each fold, blocks side by side and zero-padded to one width, in float64."""
    width = max(block.shape[1] for block in blocks)
    wide = torch.stack([functional.pad(block, (0, width - block.shape[1])) for block in blocks], 1)
    return [wide[index].double() for index in rows]


def _centred(x: list[Tensor]) -> list[Tensor]:
    # in float64 already: in float32 the centring alone is off by 4e-10
    mean = torch.stack([part.sum(0) for part in x]).sum(0) / sum(len(part) for part in x)
    return [part.sub_(mean) for part in x]


def _path(r2: Tensor) -> Tensor:
    return r2.permute(1, 2, 0)  # [alpha, block, target] -> [block, target, alpha]


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _tile(part: Tensor, count: int) -> Tensor:
    return part.repeat(*[1] * (part.ndim - 1), count)
