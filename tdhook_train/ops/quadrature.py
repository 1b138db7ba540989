"""Points and weights of integrals over [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["RULES", "gauss_legendre"]


@lru_cache(maxsize=64)
def gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Return the n points and weights that integrate every polynomial of degree 2n - 1 exactly, float64."""
    x, w = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


def _midpoint(n: int) -> tuple[Tensor, Tensor]:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n, torch.full((n,), 1 / n, dtype=torch.float64)


def _left(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n, dtype=torch.float64) / n, torch.full((n,), 1 / n, dtype=torch.float64)


def _right(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(1, n + 1, dtype=torch.float64) / n, torch.full((n,), 1 / n, dtype=torch.float64)


def _trapezoid(n: int) -> tuple[Tensor, Tensor]:
    if n == 1:
        return _midpoint(1)
    weights = torch.full((n,), 1 / (n - 1), dtype=torch.float64)
    weights[[0, -1]] /= 2
    return torch.linspace(0, 1, n, dtype=torch.float64), weights


RULES: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "gauss-legendre": gauss_legendre,
    "midpoint": _midpoint,
    "left": _left,
    "right": _right,
    "trapezoid": _trapezoid,
}
"""Points and weights by name."""
