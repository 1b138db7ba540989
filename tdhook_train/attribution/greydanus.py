"""Where in an image, or at which features, a policy looks: what blurring a place changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdhook_train.explain.patched import Patched

__all__ = ["Greydanus"]


@dataclass(frozen=True)
class Greydanus(Patched):
    """How far all targets together move when an image is blurred around a place: ``½ ‖π(x) - π(x')‖²``.

    Logits of a policy by default (the first output); explain a value apart (``targets="state_value"``). Of inputs that
    are no images, features or groups of them are replaced by a baseline. A pass for each place or group (of many rows
    at once).

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``. All of them have one score together.
        baseline: see :class:`Compared`, as is ``references``.
        groups: of inputs that are no images, see :class:`Perturbed`.
        spacing: of images, see :class:`Patched`, as are ``radius`` and ``blur``.

    Writes:
        ``("attr", key)`` [batch, *feature] for each input key, or layer, in squared units of the targets: the same for
        all channels of an image.
        ``shares`` [batch, group] where groups are named; of layers ``("shares", path)``.

    Source: Greydanus et al. 2018, arXiv:1711.00138.
    """

    @property
    def joint(self) -> bool:
        """All targets have one score."""
        return True

    def score(self, before: Tensor, after: Tensor) -> Tensor:
        """Half the squared distance: ``[row, 1, version]``."""
        return (after - before[:, None]).square().sum(2)[:, None] / 2
