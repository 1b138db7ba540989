"""Points and weights of integrals over [0, 1]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["gauss_legendre"]


def gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Return the n points and weights that integrate every polynomial of degree 2n - 1 exactly, float64."""
    x, w = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)
