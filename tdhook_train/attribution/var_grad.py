"""Where the reaction of an output to an input feature is unsteady: the variance of its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdhook_train.explain.noisy import Moments, Noisy

__all__ = ["VarGrad"]


@dataclass(frozen=True)
class VarGrad(Noisy):
    """How much the gradient for each input feature varies over noisy copies of the input.

    0 where the output is linear in a neighbourhood. A forward pass over the noisy copies of each row for all targets,
    and a backward pass over them for each target.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        samples: see :class:`Noisy`, as is ``noise``.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in the square of units of
        the target by units of the feature.

    Source: Adebayo et al. 2018, arXiv:1810.03307.
    """

    def summary(self, gradients: Moments) -> Tensor:
        """Return the variance."""
        return gradients.variance
