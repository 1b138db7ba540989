"""Ridge regression on a bilinear form of two things, ``hᵀ A g + b``: exact, or of low rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BilinearRidge", "LowRankBilinear", "outer"]

_STEPS = 1000
_TOLERANCE = 1e-9  # of the sum of squares, by which a step must lower the objective


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Return all products of a feature of one and a feature of the other: ``[n, left × right]``."""
    return (left[:, :, None] * right[:, None]).flatten(1)


class BilinearRidge:
    """The exact minimum of ``Σ (y - b - hᵀ A g)² + α ‖A‖²``, for several targets and penalties at once.

    That is ridge regression on all products of features. It is solved by their Gram matrix or, where there are more
    products than rows, by that of the rows, which is the elementwise product of the two things' own: either way by
    one eigendecomposition, whatever the number of targets and penalties.

    Args:
        left: ``[n, w]``, float64.
        right: ``[n, v]``, float64.
        y: ``[n, t]``, float64.
        alphas: penalties.
    """

    def __init__(self, left: Tensor, right: Tensor, y: Tensor, alphas: Sequence[float]) -> None:
        self._left, self._right, self._mean = left, right, y.mean(0)
        self._by_products = left.shape[1] * right.shape[1] <= len(left)
        if self._by_products:
            products = outer(left, right)
            self._centre = products.mean(0)
            products = products - self._centre
            gram, against = products.mT @ products, products.mT @ (y - self._mean)
        else:
            gram, against = self._kernel(left, right), y - self._mean
            self._centre = gram.mean(0)
            gram = gram - self._centre - self._centre[:, None] + self._centre.mean()
        values, vectors = torch.linalg.eigh(gram)
        steep = 1 / (values.clamp(min=0)[:, None] + values.new_tensor(alphas))  # [d, alpha]
        weights = vectors @ ((vectors.mT @ against)[:, :, None] * steep[:, None]).flatten(1)
        # those of rows sum to zero, as what they weigh is centred
        self._weights = weights if self._by_products else weights - weights.mean(0)
        self._count = len(alphas)

    def _kernel(self, left: Tensor, right: Tensor) -> Tensor:
        return (left @ self._left.mT) * (right @ self._right.mT)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Predict further rows: ``[n, t × alpha]``, the penalties of a target side by side."""
        seen = outer(left, right) if self._by_products else self._kernel(left, right)
        return (seen - self._centre) @ self._weights + self._mean.repeat_interleave(self._count)

    def form(self, column: int) -> Tensor:
        """Return A of one of the columns of what is predicted, ``[w, v]``."""
        weights = self._weights[:, column]
        if self._by_products:
            return weights.view(self._left.shape[1], self._right.shape[1])
        return self._left.mT @ (weights[:, None] * self._right)


class LowRankBilinear:
    """A minimum of ``Σ (y - b - hᵀ A g)² + α ‖A‖²`` over A of some rank, one target and one penalty.

    Each side in turn is solved exactly, the other held, from the best approximation of that rank to a given A until
    the objective no longer falls. With the held side orthonormal, ``‖A‖`` is the norm of what is solved for, so that
    every step is a ridge regression and none can raise the objective.

    Args:
        left: ``[n, w]``, float64.
        right: ``[n, v]``, float64.
        y: ``[n]``, float64.
        alpha: the penalty.
        rank: of A, at most.
        start: A to begin with, ``[w, v]``.
    """

    def __init__(self, left: Tensor, right: Tensor, y: Tensor, alpha: float, rank: int, start: Tensor) -> None:
        target = y - y.mean()
        total = float(target @ target)
        held, before, after = torch.linalg.svd(start, full_matrices=False).Vh[:rank].mT, total, total
        self.converged = False
        for _ in range(_STEPS):
            u = torch.linalg.qr(_side(left, right @ held, target, alpha)[0]).Q
            v, gain = _side(right, left @ u, target, alpha)
            held, after = torch.linalg.qr(v).Q, total - float(gain)
            if before - after <= _TOLERANCE * total:
                self.converged = True
                break
            before = after
        self.a, self.objective = u @ v.mT, after
        self._shift = y.mean() - self._form(left, right).mean()

    def _form(self, left: Tensor, right: Tensor) -> Tensor:
        return ((left @ self.a) * right).sum(1)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Predict further rows, ``[n]``; NaN where the steps came to no end."""
        found = self._form(left, right) + self._shift
        return found if self.converged else torch.full_like(found, torch.nan)


def _side(one: Tensor, held: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Solve one side: its weights ``[w, rank]``, and by how much they lower the objective below ``Σ y²``."""
    products = outer(one, held)
    products = products - products.mean(0)
    gram, against = products.mT @ products, products.mT @ y
    gram.diagonal().add_(alpha)
    weights = torch.cholesky_solve(against[:, None], torch.linalg.cholesky(gram))[:, 0]
    return weights.view(one.shape[1], held.shape[1]), against @ weights
