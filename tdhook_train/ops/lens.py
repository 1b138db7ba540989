"""How far outputs that were read early are from those of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["agreement", "kl", "mse", "r2", "scores"]


def kl(final: Tensor, early: Tensor) -> Tensor:
    """Return the mean of KL(final ‖ early) over all distributions, in nats.

    Args:
        final: logits of the network, ``[..., category]``; -inf rules a category out.
        early: as many others.
    """
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (final, early))
    p = log_p.exp()
    return torch.where(p == 0, 0, p * (log_p - log_q)).sum(-1).mean()  # 0 log 0 = 0


def agreement(final: Tensor, early: Tensor) -> Tensor:
    """Return the share of distributions whose likeliest category is the same; NaN where some are not finite."""
    lost = final.isnan().any() | early.isnan().any()
    same = (final.argmax(-1) == early.argmax(-1)).double().mean()
    return torch.where(lost, torch.nan, same)


def mse(final: Tensor, early: Tensor) -> Tensor:
    """Return the mean squared difference."""
    return (final.double() - early.double()).square().mean()


def r2(final: Tensor, early: Tensor) -> Tensor:
    """Return the share of the spread over rows, all features together; NaN where there is none.

    Args:
        final: numbers of the network, ``[row, ...]``.
        early: as many others.
    """
    left = (final.double() - early.double()).square().sum()
    return 1 - left / spread(final)


def spread(final: Tensor) -> Tensor:
    """Return the sum of squares about the mean of the rows; NaN where it is rounding."""
    final = final.double()
    found = (final - final.mean(0)).square().sum()
    return torch.where(found <= 1e-24 * final.square().sum(), torch.nan, found)


_SCORES: Mapping[str, Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "logits": {"kl": kl, "agreement": agreement},
    "values": {"mse": mse, "r2": r2},
}


def scores(kind: str, final: Tensor, early: Tensor) -> dict[str, Tensor]:
    """Return the scores of a kind of output, ``"logits"`` or ``"values"``, float64 on the CPU."""
    return {name: score(final, early).cpu() for name, score in _SCORES[kind].items()}
