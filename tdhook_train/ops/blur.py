"""Images without their details."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["blurred"]

_REACH = 3.0  # standard deviations of the kernel that are kept


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Blur the last two dimensions by a Gaussian, ``sigma`` in pixels; edges are continued, so that a flat image stays.

    Args:
        image: ``[..., height, width]``, floating-point.
        sigma: standard deviation, above 0.
    """
    for dim in (-2, -1):
        image = _along(image.movedim(dim, -1), sigma).movedim(-1, dim)
    return image


def _along(line: Tensor, sigma: float) -> Tensor:
    reach = max(1, round(_REACH * sigma))
    at = torch.arange(-reach, reach + 1, dtype=line.dtype, device=line.device)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    places = torch.arange(-reach, line.shape[-1] + reach, device=line.device).clamp(0, line.shape[-1] - 1)
    return line[..., places].unfold(-1, len(kernel), 1) @ (kernel / kernel.sum())
