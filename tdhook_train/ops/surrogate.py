"""Linear functions fitted to weighted points: any number of small problems at once, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ridge_surrogate", "summing_surrogate"]

_RANK = 1e-10  # eigenvalues below this share of the largest count as 0


def ridge_surrogate(x: Tensor, y: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Fit ``y`` by ``x`` and a constant: least sum of weighted squared errors and ``alpha`` times squared coefficients.

    Args:
        x: ``[..., n, m]``.
        y: ``[..., n, target]``.
        weight: of each point, ``[..., n]``.
        alpha: penalty, which the constant does not pay; the smallest coefficients among the best where it is 0.

    Returns:
        Coefficients ``[..., m, target]``, and the share of the weighted variance that is explained, ``[..., target]``,
        NaN where ``y`` does not vary.
    """
    part = (weight / weight.sum(-1, keepdim=True))[..., None]
    x, y = x - (part * x).sum(-2, keepdim=True), y - (part * y).sum(-2, keepdim=True)
    weighted = weight[..., None] * x
    gram, moment = weighted.mT @ x, weighted.mT @ y
    if alpha:
        penalty = alpha * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        coefficients = torch.cholesky_solve(moment, torch.linalg.cholesky(gram + penalty))
    else:
        coefficients = torch.linalg.pinv(gram, rtol=_RANK, hermitian=True) @ moment
    error, spread = ((part * value.square()).sum(-2) for value in (y - x @ coefficients, y))
    return coefficients, 1 - error / spread


def summing_surrogate(x: Tensor, y: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """Fit ``y`` by ``x``, without a constant, by coefficients that sum to ``total`` exactly: ``[..., m, target]``.

    Args:
        x: ``[..., n, m]``.
        y: ``[..., n, target]``.
        weight: of each point, ``[n]``.
        total: ``[..., target]``.
    """
    m = x.shape[-1]
    weighted = weight[:, None] * x
    gram, moment = weighted.mT @ x, weighted.mT @ y
    even = total[..., None, :] / m
    # b = even + P c with P the projection that takes the mean away: sums stay, and c is free
    project = torch.eye(m, dtype=x.dtype, device=x.device) - 1 / m
    inner = torch.linalg.pinv(project @ gram @ project, rtol=_RANK, hermitian=True)
    return even + inner @ (project @ (moment - gram.sum(-1, keepdim=True) * even))
