"""How many directions a matrix rows × units uses, from its singular values."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_rank", "feature_rank", "gram", "singular_values", "srank", "stable_rank"]

_ROUNDING = 1e-15  # of the largest eigenvalue; below it lies the rounding of the decomposition
_TIE = 1e-9  # of the whole sum: what rounding makes of sums that are equal


def gram(rows: Tensor) -> Tensor:
    """Multiply ``[rows, units]`` with itself along its longer side, as it is and less its mean: ``[2, side, side]``.

    In float64. XᵀX and XXᵀ have the same eigenvalues but for zeros, so the smaller of the two will do. A unit that
    differs from its mean by no more than the rounding of its dtype is constant: less its mean it is 0.
    """
    rounding = 4 * torch.finfo(rows.dtype).eps
    rows = rows.detach().double()
    mean = rows.mean(0)
    spread = rows - mean
    spread = torch.where(spread.abs().amax(0) <= rounding * mean.abs(), 0.0, spread)
    if rows.shape[1] > len(rows):
        return torch.stack([rows @ rows.T, spread @ spread.T])
    centred = spread.T @ spread
    return torch.stack([centred + len(rows) * mean[:, None] * mean, centred])


def singular_values(grams: Tensor) -> Tensor:
    """Return σ of each matrix from its product with itself, the largest first: ``[..., side]``.

    What is below 3e-8 of the largest is 0: the product does not hold it. NaN where a matrix is not finite.
    """
    finite = grams.isfinite().all(-1).all(-1)[..., None]
    values = torch.linalg.eigvalsh(torch.where(finite[..., None], grams, 0.0)).flip(-1)
    floor = values[..., :1].clamp_min(0) * _ROUNDING
    return torch.where(finite, torch.where(values > floor, values, 0.0).sqrt(), torch.nan)


def effective_rank(sigma: Tensor) -> Tensor:
    """Exp H(σ / Σσ); 0 where all are 0."""
    total = sigma.sum(-1, keepdim=True)
    p = sigma / torch.where(total == 0, 1.0, total)
    return torch.where(total[..., 0] == 0, 0.0, torch.special.entr(p).sum(-1).exp())


def srank(sigma: Tensor, delta: float) -> Tensor:
    """The least k with Σ_{i≤k} σᵢ ≥ (1 - δ) Σσ, of σ that fall; 0 where all are 0."""
    sums = sigma.cumsum(-1)
    wanted = (1 - delta - _TIE) * sums[..., -1:]
    rank = (sums < wanted).sum(-1).to(sigma.dtype) + 1
    total = sums[..., -1]
    return torch.where(total.isnan(), torch.nan, torch.where(total == 0, 0.0, rank))


def feature_rank(sigma: Tensor, rows: int, epsilon: float) -> Tensor:
    """The number of σ / √rows above ε."""
    rank = (sigma / rows**0.5 > epsilon).sum(-1).to(sigma.dtype)
    return torch.where(sigma.isnan().any(-1), torch.nan, rank)


def stable_rank(sigma: Tensor) -> Tensor:
    """‖X‖²_F / σ₁², of σ that fall; 0 where all are 0."""
    largest = sigma[..., :1]
    return (sigma / torch.where(largest == 0, 1.0, largest)).square().sum(-1)
