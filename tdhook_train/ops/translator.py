"""Affine translators of a residual stream: fitted so that a head makes of one layer what it makes of the last.

A translator maps ``h`` to ``h + s (Θ z + b)`` with ``z = (h - m) / r``: ``m`` the mean of the rows that it is fitted
to, ``r`` their spread, ``s`` the spread of the stream at the end. ``Θ = 0``, ``b = 0`` is the identity. What is
minimised is a loss of the outputs plus ``penalty ‖Θ‖²``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Translator", "by_lbfgs", "by_ridge"]

_RELATIVE, _ABSOLUTE = 1e-3, 1e-6  # gradients that count as none, against the first one and as they are


@dataclass(frozen=True)
class Translator:
    """See the module; everything in float64.

    Args:
        mean: m, ``[unit]``.
        spread: r.
        size: s.
        weight: Θ, ``[unit, unit]``.
        bias: b, ``[unit]``.
    """

    mean: Tensor
    spread: Tensor
    size: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def identity(cls, layer: Tensor, stream: Tensor) -> Translator:
        """Return the one that changes nothing, scaled to some rows.

        Args:
            layer: ``[..., unit]``, what is translated.
            stream: ``[..., unit]``, the stream at the end.
        """
        layer, stream = (value.double().flatten(0, -2) for value in (layer, stream))
        mean, width = layer.mean(0), layer.shape[-1]
        weight = torch.zeros(width, width, dtype=torch.float64, device=layer.device)
        return cls(mean, _spread(layer), _spread(stream), weight, weight.new_zeros(width))

    def __call__(self, layer: Tensor) -> Tensor:
        """Translate ``[..., unit]``."""
        layer = layer.double()
        return layer + self.size * ((layer - self.mean) / self.spread @ self.weight.mT + self.bias)


def by_ridge(start: Translator, layer: Tensor, missing: Tensor, head: Tensor, penalty: float) -> Translator:
    """Fit exactly where the output is linear in the stream and the loss is ``‖error‖² / total + penalty ‖Θ‖²``.

    With the singular values S of ``s·head`` = U S Vᵀ the rows of VᵀΘ are ridge regressions of their own, each of one
    column of ``missing U`` on z.

    Args:
        start: the identity, scaled to these rows.
        layer: ``[row, unit]``.
        missing: what the head's output of the layer lacks, ``[row, output]``.
        head: its weights, ``[output, unit]``.
        penalty: times ``total``: in squares of the output's unit, summed over rows.
    """
    u, s, vh = torch.linalg.svd(start.size * head.double(), full_matrices=False)
    s = torch.where(s > 1e-10 * s.amax(), s, 0.0)
    z = (layer.double() - start.mean) / start.spread
    wanted = missing.double() @ u  # [row, direction]
    mean = wanted.mean(0)
    values, vectors = torch.linalg.eigh(z.mT @ z)
    along = vectors.mT @ (z.mT @ (wanted - mean))  # [unit, direction]
    shrunk = s / (s.square() * values.clamp(min=0)[:, None] + penalty)
    weight = vh.mT @ (vectors @ (along * shrunk)).mT
    bias = vh.mT @ torch.where(s > 0, mean / s, 0.0)
    return replace(start, weight=weight, bias=bias)


def by_lbfgs(
    start: Translator, loss: Callable[[Translator], Tensor], penalty: float, steps: int
) -> tuple[Translator, bool]:
    """Fit by L-BFGS from the identity on, and say whether that came to rest.

    Args:
        start: the identity.
        loss: of the outputs of a translator, with a graph back to its weight and bias.
        penalty: on ``‖Θ‖²``.
        steps: at most so many, each of them 1.25 evaluations of the loss at most.
    """
    parts = [start.weight.clone().requires_grad_(), start.bias.clone().requires_grad_()]
    optimiser = torch.optim.LBFGS(parts, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")
    best: tuple[float, list[Tensor]] = torch.inf, [part.detach().clone() for part in parts]
    slopes: list[float] = []

    def closure() -> Tensor:
        nonlocal best
        total = loss(replace(start, weight=parts[0], bias=parts[1])).double() + penalty * parts[0].square().sum()
        for part, slope in zip(parts, torch.autograd.grad(total, parts), strict=True):
            part.grad = slope
        if float(total.detach()) <= best[0]:
            best = float(total.detach()), [part.detach().clone() for part in parts]
            slopes.append(max(float(part.grad.abs().amax()) for part in parts if part.grad is not None))
        return total

    optimiser.step(closure)
    rests = bool(slopes) and slopes[-1] <= max(_RELATIVE * slopes[0], _ABSOLUTE)
    return replace(start, weight=best[1][0], bias=best[1][1]), rests


def _spread(rows: Tensor) -> Tensor:
    """Return the root mean square of rows about their mean, 1 where they are all the same."""
    found = (rows - rows.mean(0)).square().mean().sqrt()
    return torch.where(found > 1e-12 * rows.abs().amax(), found, 1.0)
