"""Which input features speak for an output, by ReLUs that let only what speaks for it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdhook_train.explain import Attribution, Found, Problem
from tdhook_train.explain.by_rule import passes, relu_gradients
from tdhook_train.hooks.reroute import Passed
from tdhook_train.keys import path_of

__all__ = ["GuidedBackpropagation", "guided"]


@dataclass(frozen=True)
class GuidedBackpropagation(Attribution):
    """Which input features an output reacts to, when every ReLU that was open lets only positive gradients back.

    Sharp pictures that hardly go by the target: see the critique of Adebayo et al. 2018, arXiv:1810.03292. One forward
    pass for all targets and layers, and one backward pass for each target.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in units of the target by
        units of the feature.

    Raises:
        NetworkError: the model has no ``nn.ReLU``, or calls relu as a function, which no rule reaches.

    Source: Springenberg et al. 2014, arXiv:1412.6806.
    """

    moves: ClassVar[bool] = False

    def explain(self, problem: Problem) -> Found:
        """Differentiate every target, with another way back through ReLUs."""
        grads = relu_gradients(type(self).__name__, problem, guided)
        return {("attr", *path_of(site)): grad for site, grad in grads.items()}


def guided(passed: Passed, gradient: Tensor) -> Tensor:
    """Fig. 1 b: R_in = 1[x > 0] · 1[R_out > 0] · R_out."""
    return gradient.clamp(min=0) * passes(passed.output, passed.module)
