"""How far decisions on the same states have moved, from outputs before and after."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["flips", "kl", "normal_kl", "relative_change", "total_variation"]


def flips(before: Tensor, after: Tensor) -> Tensor:
    """Say where the largest of ``[..., class]`` is another one: 1 or 0, ``[...]``; of equal ones the first counts."""
    return (before.argmax(-1) != after.argmax(-1)).double()


def total_variation(before: Tensor, after: Tensor) -> Tensor:
    """½ Σ |p - q| of the softmax of logits ``[..., class]``: ``[...]``."""
    return (before.softmax(-1) - after.softmax(-1)).abs().sum(-1) / 2


def kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) of the softmax of logits ``[..., class]``, in nats: ``[...]``.

    A class that is ruled out before (a logit of -inf) adds nothing; one that is ruled out only after makes it infinite.
    """
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


def normal_kl(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Tensor:
    """KL(before ‖ after) of independent normals, each mean and standard deviation ``[..., dimension]``: ``[...]``."""
    (mean, scale), (other, spread) = before, after
    # log σ₁/σ₀ + (σ₀² + (μ₀ - μ₁)²) / 2σ₁² - ½
    each = (spread / scale).log() + (scale.square() + (mean - other).square()) / (2 * spread.square()) - 0.5
    return each.sum(-1)


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """E|after - before| ÷ std before, of all numbers; NaN where one is infinite, or before all are the same."""
    rounding = 4 * torch.finfo(before.dtype).eps
    before, after = before.double(), after.double()
    spread = before.std(correction=0)
    spread = torch.where(spread > rounding * before.mean().abs(), spread, torch.nan)
    change = (after - before).abs().mean() / spread
    return torch.where(change.isfinite(), change, torch.nan)
