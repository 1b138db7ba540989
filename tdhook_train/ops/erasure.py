"""Least-squares concept erasure: what to take from activations so that nothing linear tells a concept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Eraser", "factors", "leace"]

_RELATED = 1e-10  # a correlation below this is rounding
_OF_SIZE = 1e-6  # singular values of a projection are 0, or 1 and more


@dataclass(frozen=True)
class Eraser:
    """An affine map that takes away few directions: x - ``taken``ᵀ ``along`` (x - ``mean``).

    Args:
        along: ``[rank, unit]``, float64.
        taken: ``[rank, unit]``, float64.
        mean: ``[unit]``, float64.
    """

    along: Tensor
    taken: Tensor
    mean: Tensor

    @property
    def projection(self) -> Tensor:
        """P of x ↦ Px + b, ``[unit, unit]``."""
        return torch.eye(len(self.mean)).to(self.mean) - self.taken.T @ self.along

    @property
    def bias(self) -> Tensor:
        """B of x ↦ Px + b, ``[unit]``."""
        return self.taken.T @ (self.along @ self.mean)


def leace(x: Tensor, z: Tensor) -> Eraser:
    """Return the affine map nearest to the identity after which nothing linear in ``x`` tells ``z``.

    With W = Σxx^(-1/2), pseudo-inverse where Σxx is singular, P = I - W⁺ Π W, where Π projects on the columns of WΣxz.
    Of the singular value decomposition of the centred rows X = U S Vᵀ, WΣxz is V UᵀZ to a factor: nothing is squared.

    Args:
        x: ``[row, unit]``, float64.
        z: ``[row, column]``, float64; columns that do not vary ask for nothing.

    Source: Belrose et al. 2023, arXiv:2306.03819, theorem 4.3.
    """
    mean = x.mean(0)
    u, s, vh = torch.linalg.svd(x - mean, full_matrices=False)
    kept = s > s.amax() * max(x.shape) * torch.finfo(s.dtype).eps
    u, s, vh = u[:, kept], s[kept], vh[kept]
    z = z - z[:1]  # exactly 0 where a column does not vary
    z = z - z.mean(0)
    z = z / torch.where((length := torch.linalg.vector_norm(z, dim=0)) > 0, length, 1.0)
    q, related, _ = torch.linalg.svd(u.T @ z, full_matrices=False)
    q = q[:, related > _RELATED]
    return Eraser((q / s[:, None]).T @ vh, (q * s[:, None]).T @ vh, mean)


def factors(projection: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``along`` and ``taken``, ``[rank, unit]``, of a projection I - ``taken``ᵀ ``along``, ``[unit, unit]``."""
    removed = torch.eye(len(projection)).to(projection) - projection
    left, s, right = torch.linalg.svd(removed)
    kept = s > _OF_SIZE
    return right[kept], (left * s).T[kept]
