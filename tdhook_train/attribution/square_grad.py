"""Which input features an output reacts to around a value: the mean square of its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdhook_train.explain.noisy import Moments, Noisy

__all__ = ["SquareGrad"]


@dataclass(frozen=True)
class SquareGrad(Noisy):
    """How much an output changes with each input feature, squared, in the mean over noisy copies of the input.

    Larger than the square of the mean by what `VarGrad` gives: gradients of either sign count. A forward pass over the
    noisy copies of each row for all targets, and a backward pass over them for each target.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        samples: see :class:`Noisy`, as is ``noise``.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in the square of units of
        the target by units of the feature.

    Source: Hooker et al. 2019, arXiv:1806.10758.
    """

    def summary(self, gradients: Moments) -> Tensor:
        """Return the mean square."""
        return gradients.variance + gradients.mean.square()
