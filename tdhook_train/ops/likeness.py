"""How alike two attributions of the same features are: their order, their signs, their largest ones."""

from __future__ import annotations

from math import comb

import torch
from scipy.stats import rankdata
from torch import Tensor

__all__ = ["by_size", "cosine", "cosine_by_chance", "jaccard", "jaccard_by_chance", "largest", "spearman", "varied"]


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """Return the rank correlation of magnitudes, over the last dimension; NaN where one has no ranking.

    By chance it is 0.
    """
    return cosine(by_size(one), by_size(other))


def by_size(values: Tensor) -> Tensor:
    """Rank magnitudes along the last dimension, less the mean rank: rank correlations are cosines of these."""
    sizes = values.detach().abs().double()
    ranks = torch.as_tensor(rankdata(sizes.cpu().numpy(), axis=-1), device=values.device)
    return ranks - ranks.mean(-1, keepdim=True)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine over the last dimension; NaN where one is 0."""
    scale = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(other, dim=-1)
    return torch.where(scale > 0, (one * other).sum(-1) / scale, torch.nan)


def cosine_by_chance(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean cosine over all orders of the features of one: about 0 only where signs are balanced."""
    scale = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(other, dim=-1)
    return torch.where(scale > 0, one.mean(-1) * other.sum(-1) / scale, torch.nan)


def largest(values: Tensor, top: int) -> Tensor:
    """Mark with 1 the ``top`` features of largest magnitude, the first of equals."""
    chosen = values.abs().argsort(stable=True, dim=-1, descending=True)[..., :top]
    return torch.zeros_like(values).scatter(-1, chosen, 1.0)


def varied(values: Tensor) -> Tensor:
    """Say whether not all magnitudes are the same."""
    return values.abs().amax(-1) > values.abs().amin(-1)


def jaccard(one: Tensor, other: Tensor, top: int) -> Tensor:
    """Return the Jaccard index of the ``top`` features of largest magnitude, less that of as many drawn at random.

    NaN where all features of one are of one size.

    Args:
        one: ``[..., feature]``.
        other: likewise.
        top: at most as many as there are features.
    """
    shared = (largest(one, top) * largest(other, top)).sum(-1)
    found = shared / (2 * top - shared) - jaccard_by_chance(one.shape[-1], top)
    return torch.where(varied(one) & varied(other), found, torch.nan)


def jaccard_by_chance(n: int, k: int) -> float:
    """Return the mean Jaccard index of two sets of k of n, each drawn at random: ``Σ P(j) j / (2k - j)``."""
    ways = comb(n, k)
    return sum(comb(k, j) * comb(n - k, k - j) / ways * j / (2 * k - j) for j in range(k + 1))
