"""Which input features an output reacts to around a value: the mean of its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdhook_train.explain.noisy import Moments, Noisy

__all__ = ["SmoothGrad"]


@dataclass(frozen=True)
class SmoothGrad(Noisy):
    """How much an output changes with each input feature, in the mean over noisy copies of the input.

    The gradient of a network jumps about from point to point; its mean over a neighbourhood does less. A forward pass
    over the noisy copies of each row for all targets, and a backward pass over them for each target.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        samples: see :class:`Noisy`, as is ``noise``.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in units of the target by
        units of the feature.

    Source: Smilkov et al. 2017, arXiv:1706.03825.
    """

    def summary(self, gradients: Moments) -> Tensor:
        """Return the mean."""
        return gradients.mean
