"""What each input feature contributes to an output, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tdhook_train.explain import Attribution, Found, Problem
from tdhook_train.explain.here import gradients_here
from tdhook_train.keys import path_of

__all__ = ["InputXGradient"]


@dataclass(frozen=True)
class InputXGradient(Attribution):
    """How much of an output each input feature carries, if the output went on as steeply as it is here: x · ∂F/∂x.

    Complete (shares sum to the output) where the network is homogeneous: ReLU or max-pooling without biases. One
    forward pass for all targets and layers, and one backward pass for each target.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in units of the target.

    Source: Shrikumar et al. 2016, arXiv:1605.01713.
    """

    moves: ClassVar[bool] = False

    def explain(self, problem: Problem) -> Found:
        """Multiply every gradient with the value that it is taken at."""
        grads = gradients_here(problem)
        return {("attr", *path_of(site)): grad * problem.point[site][:, None] for site, grad in grads.items()}
