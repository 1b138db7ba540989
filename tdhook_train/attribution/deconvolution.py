"""Which input features speak for an output, by ReLUs that work on the way back as they do on the way there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdhook_train.explain import Attribution, Found, Problem
from tdhook_train.explain.by_rule import relu_gradients
from tdhook_train.hooks.reroute import Passed
from tdhook_train.keys import path_of

__all__ = ["Deconvolution"]


@dataclass(frozen=True)
class Deconvolution(Attribution):
    """Which input features an output reacts to, when every ReLU lets positive gradients back, open or not.

    One forward pass for all targets and layers, and one backward pass for each target.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in units of the target by
        units of the feature.

    Raises:
        NetworkError: the model has no ``nn.ReLU``, or calls relu as a function, which no rule reaches.

    Source: Zeiler and Fergus 2013, arXiv:1311.2901; as a rule for gradients, Simonyan et al. 2013, arXiv:1312.6034.
    """

    moves: ClassVar[bool] = False

    def explain(self, problem: Problem) -> Found:
        """Differentiate every target, with another way back through ReLUs."""
        grads = relu_gradients(type(self).__name__, problem, _rectified)
        return {("attr", *path_of(site)): grad for site, grad in grads.items()}


def _rectified(_passed: Passed, gradient: Tensor) -> Tensor:
    """Sec. 2.1: R_in = 1[R_out > 0] · R_out."""
    return gradient.clamp(min=0)
