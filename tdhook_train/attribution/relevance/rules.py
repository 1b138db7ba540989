"""How the relevance of what a layer gives out is shared among its inputs: one rule a class.

A rule is frozen settings and, for layers with weights, its terms: relevance ``R`` of the output z goes back as
``sum over terms of a * W^T (R * m)``, for parts ``a`` of the input, versions ``W`` of the weight, multipliers ``m``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_train.attribution.relevance.affine import Affine
from tdhook_train.errors import SettingsError
from tdhook_train.hooks.reroute import Passed

__all__ = [
    "AlphaBeta",
    "Epsilon",
    "Flat",
    "Gamma",
    "Norm",
    "Pass",
    "RelevanceRule",
    "Shares",
    "Term",
    "WSquare",
    "ZBox",
    "ZPlus",
    "Zero",
    "stabilised",
]

Term = tuple[Tensor | None, Tensor, Tensor]
"""A part of the input (None for ones), a weight, a multiplier of the output's relevance."""


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """Move denominators away from zero by ``epsilon``, zero itself to the positive side."""
    return z + torch.where(z < 0, -epsilon, epsilon)


@dataclass(frozen=True)
class RelevanceRule(ABC):
    """What becomes of relevance at one call of a module.

    Args:
        stabiliser: by which denominators are kept from zero.
    """

    stabiliser: float = 1e-6

    def __post_init__(self) -> None:
        if not self.stabiliser > 0:
            raise SettingsError(f"{type(self).__name__} needs a stabiliser above 0, got {self.stabiliser}")

    @abstractmethod
    def back(self, passed: Passed, relevance: Tensor) -> Tensor:
        """Return the relevance of the input."""


@dataclass(frozen=True)
class Shares(RelevanceRule):
    """A rule for linear and convolutional layers, which is made of terms."""

    @abstractmethod
    def terms(self, layer: Affine, x: Tensor, z: Tensor) -> list[Term]:
        """Return the terms for input ``x`` and output ``z``; they are kept for the other targets."""

    def back(self, passed: Passed, relevance: Tensor) -> Tensor:
        """Go by the terms, without a normalisation merged into the layer."""
        layer, (x,) = Affine(passed.module), passed.inputs
        return shared(self.terms(layer, x, passed.output), layer, x, relevance)


def shared(terms: list[Term], layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
    """Bring relevance to the input of a layer."""
    found = torch.zeros_like(x)
    for a, weight, multiplier in terms:
        part = layer.back(relevance * multiplier, weight, x)
        found = found + (part if a is None else a * part)
    return found


@dataclass(frozen=True)
class Zero(Shares):
    """LRP-0: in proportion to what each input adds to z; nothing where z is zero.

    Source: Bach et al. 2015, doi:10.1371/journal.pone.0130140.
    """

    def terms(self, layer: Affine, x: Tensor, z: Tensor) -> list[Term]:
        """R_i = sum_j x_i w_ij / z_j R_j."""
        return [(x, layer.weight, torch.where(z == 0, 0, 1 / z))]


@dataclass(frozen=True)
class Epsilon(Shares):
    """LRP-epsilon: as LRP-0, but epsilon takes away what weak and contradictory inputs carry.

    Source: Bach et al. 2015, doi:10.1371/journal.pone.0130140.
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon > 0:
            raise SettingsError(f"Epsilon needs an epsilon above 0, got {self.epsilon}; without it, it is Zero")

    def terms(self, layer: Affine, x: Tensor, z: Tensor) -> list[Term]:
        """R_i = sum_j x_i w_ij / (z_j + epsilon sign z_j) R_j."""
        return [(x, layer.weight, 1 / stabilised(z, self.epsilon))]


@dataclass(frozen=True)
class ZPlus(Shares):
    """z+: only by what adds to z, which is positive inputs by positive weights and negative by negative.

    Source: Montavon et al. 2017, arXiv:1512.02479; with negative inputs, Andeol et al. 2021, arXiv:2012.07662.
    """

    def terms(self, layer: Affine, x: Tensor, z: Tensor) -> list[Term]:  # noqa: ARG002
        """R_i = sum_j (x_i w_ij)^+ / sum_k (x_k w_kj)^+ R_j."""
        return list(_signed(layer, x, layer.plus, layer.minus, self.stabiliser))


@dataclass(frozen=True)
class AlphaBeta(Shares):
    """What adds to z gets alpha times the relevance, what takes from it minus beta times.

    Args:
        stabiliser: by which denominators are kept from zero.
        alpha: of the positive contributions, one more than beta.
        beta: of the negative contributions.

    Source: Bach et al. 2015, doi:10.1371/journal.pone.0130140.
    """

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.beta >= 0 and abs(self.alpha - self.beta - 1) < 1e-9):
            raise SettingsError(f"AlphaBeta needs alpha - beta = 1 and beta >= 0, got {self.alpha} and {self.beta}")

    def terms(self, layer: Affine, x: Tensor, z: Tensor) -> list[Term]:  # noqa: ARG002
        """R_i = sum_j (alpha (x_i w_ij)^+ / z_j^+ - beta (x_i w_ij)^- / z_j^-) R_j."""
        adds = _signed(layer, x, layer.plus, layer.minus, self.stabiliser, self.alpha)
        takes = _signed(layer, x, layer.minus, layer.plus, self.stabiliser, -self.beta) if self.beta else ()
        return [*adds, *takes]


@dataclass(frozen=True)
class Gamma(Shares):
    """LRP-gamma: contributions of the sign of z are favoured by gamma.

    Args:
        stabiliser: by which denominators are kept from zero.
        gamma: 0 gives LRP-0, infinity z+.

    Source: Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10; for inputs of both signs, Andeol et al. 2021,
    arXiv:2012.07662.
    """

    gamma: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma >= 0:
            raise SettingsError(f"Gamma needs a gamma of 0 or more, got {self.gamma}")

    def terms(self, layer: Affine, x: Tensor, z: Tensor) -> list[Term]:
        """R_i = sum_j (x_i w_ij + gamma (x_i w_ij)^s) / sum_k (...) R_j, with s the sign of z_j."""
        up, down = layer.tilted(layer.plus, self.gamma), layer.tilted(layer.minus, self.gamma)
        above = _signed(layer, x, up, down, self.stabiliser, z > 0)
        below = _signed(layer, x, down, up, self.stabiliser, z < 0) if bool((z < 0).any()) else ()
        return [*above, *below]


@dataclass(frozen=True)
class Flat(Shares):
    """Evenly over all inputs, whatever they and the weights are; for a first layer.

    Source: Lapuschkin et al. 2019, arXiv:1902.10178.
    """

    def terms(self, layer: Affine, x: Tensor, z: Tensor) -> list[Term]:  # noqa: ARG002
        """R_i = sum_j 1 / sum_k 1 R_j."""
        ones = torch.ones_like(layer.weight)
        return [(None, ones, 1 / stabilised(layer.out(torch.ones_like(x[:1]), ones), self.stabiliser))]


@dataclass(frozen=True)
class WSquare(Shares):
    """By squared weights, whatever the inputs are; for a first layer whose inputs have no bounds.

    Source: Montavon et al. 2017, arXiv:1512.02479.
    """

    def terms(self, layer: Affine, x: Tensor, z: Tensor) -> list[Term]:  # noqa: ARG002
        """R_i = sum_j w_ij^2 / (sum_k w_kj^2 + b_j^2) R_j: the bias keeps its part, as in the other rules."""
        squares, bias = layer.weight**2, None if layer.bias is None else layer.bias**2
        return [(None, squares, 1 / stabilised(layer.out(torch.ones_like(x[:1]), squares, bias), self.stabiliser))]


@dataclass(frozen=True)
class ZBox(Shares):
    """z^B: for a first layer whose inputs lie in a box, such as pixels.

    Args:
        stabiliser: by which denominators are kept from zero.
        low: least value of the input, or of each channel (features of a linear layer).
        high: greatest value, likewise.

    Source: Montavon et al. 2017, arXiv:1512.02479.
    """

    low: float | tuple[float, ...] = -3.0
    high: float | tuple[float, ...] = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("low", "high"):
            if isinstance(given := getattr(self, name), list):
                object.__setattr__(self, name, tuple(given))
        if not bool((torch.tensor(self.low) < torch.tensor(self.high)).all()):
            raise SettingsError(f"ZBox needs low below high, got {self.low} and {self.high}")

    def terms(self, layer: Affine, x: Tensor, z: Tensor) -> list[Term]:
        """R_i = sum_j (x_i w_ij - l w_ij^+ - h w_ij^-) / sum_k (...) R_j."""
        (plus, b_plus), (minus, b_minus) = layer.plus, layer.minus
        low, high = (_filled(x, bound, layer.spatial) for bound in (self.low, self.high))
        box = layer.out(low, plus, b_plus) + layer.out(high, minus, b_minus)
        m = 1 / stabilised(z - box, self.stabiliser)
        return [(x, layer.weight, m), (-low, plus, m), (-high, minus, m)]


@dataclass(frozen=True)
class Pass(RelevanceRule):
    """As it is: for modules that work on each number by itself, and for normalisations.

    Source: Bach et al. 2015, doi:10.1371/journal.pone.0130140; of layer norms, Achtibat et al. 2024, arXiv:2402.05602.
    """

    def back(self, passed: Passed, relevance: Tensor) -> Tensor:  # noqa: ARG002
        """R_i = R_i."""
        return relevance


@dataclass(frozen=True)
class Norm(RelevanceRule):
    """In proportion to what each input adds, for modules without weights: sums and means.

    Source: Bach et al. 2015, doi:10.1371/journal.pone.0130140.
    """

    def back(self, passed: Passed, relevance: Tensor) -> Tensor:
        """R_i = x_i d/dx_i sum_j z_j [R_j / z_j], the bracket held still."""
        with torch.enable_grad():
            x = passed.inputs[0].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                passed.again(x), x, relevance / stabilised(passed.output, self.stabiliser)
            )
        return x.detach() * gradient


def _signed(
    layer: Affine,
    x: Tensor,
    above: tuple[Tensor, Tensor | None],
    below: tuple[Tensor, Tensor | None],
    stabiliser: float,
    times: Tensor | float = 1.0,
) -> Iterator[Term]:
    """Terms of the positive inputs by one weight and of the negative ones by another, over one denominator."""
    up, down = x.clamp(min=0), x.clamp(max=0)
    both = bool((x < 0).any())  # after a ReLU there are none, which is half of the work
    z = layer.out(up, *above)
    z = z + layer.out(down, below[0]) if both else z
    m = times / stabilised(z, stabiliser)
    yield up, above[0], m
    if both:
        yield down, below[0], m


def _filled(x: Tensor, bound: float | tuple[float, ...], spatial: int) -> Tensor:
    values = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    return (values.view(-1, *[1] * spatial) if values.ndim else values).expand_as(x)
