"""Which features an agent's choice of just this action rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tdhook_train.errors import TargetError
from tdhook_train.explain.attribution import one_of
from tdhook_train.explain.patched import Patched

__all__ = ["Sarfa"]


@dataclass(frozen=True)
class Sarfa(Patched):
    """How far a feature speaks for one action and for no other: specific and relevant feature attribution.

    ``2 K Δp / (K + Δp)``: ``Δp`` is what the action's probability loses without the feature (0 where it gains), and
    ``K = 1 / (1 + KL)`` says whether the other actions keep their proportions. Images are blurred around the places of
    a grid; of other inputs, features or groups of them are replaced by a baseline. A pass for each place or group (of
    many rows at once), whatever the number of actions.

    Args:
        targets: the logits (or values) of two or more actions; by default all of the first output. See
            :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction`` and
            ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.
        groups: of inputs that are no images, see :class:`Perturbed`.
        spacing: of images, see :class:`Patched`, as are ``radius`` and ``blur``.
        action: which action is explained: the most probable one in each row, or each of them as a target.

    Writes:
        ``("attr", key)`` [batch, *feature] for each input key, or layer, between 0 and 1; where each action is
        explained, [batch, target, *feature].
        ``shares`` [batch, group] or [batch, target, group] where groups are named; of layers ``("shares", path)``.

    Source: Puri et al. 2020, arXiv:1912.12191.
    """

    action: Literal["chosen", "each"] = "chosen"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, action=("chosen", "each"))

    @property
    def joint(self) -> bool:
        """One action is explained, by the logits of all."""
        return self.action == "chosen"

    def score(self, before: Tensor, after: Tensor) -> Tensor:
        """Score the explained actions, ``[row, action, version]``.

        Raises:
            TargetError: there is one action only.
        """
        if before.shape[1] < 2:
            raise TargetError("Sarfa compares the logits of 2 or more actions, targets names one; name them all")
        if self.action == "chosen":
            return _sarfa(before, after, before.argmax(1))[:, None]
        actions = torch.arange(before.shape[1], device=before.device)[:, None].expand(-1, len(before))
        return torch.stack([_sarfa(before, after, action) for action in actions], 1)


def _sarfa(before: Tensor, after: Tensor, action: Tensor) -> Tensor:
    """Score one action of each row: ``[row, version]``."""
    before = before[:, None]
    own = torch.zeros_like(before, dtype=torch.bool).scatter(2, action[:, None, None], True)  # [row, 1, action]
    drop = ((before.softmax(2) - after.softmax(2)) * own).sum(2)
    was, now = (logits.masked_fill(own, -torch.inf).log_softmax(2) for logits in (before, after))
    # KL(P_rem(x') || P_rem(x)), over the other actions
    share = now.exp()
    k = 1 / (1 + torch.where(share > 0, share * (now - was), 0).sum(2))
    return torch.where(drop > 0, 2 * k * drop / (k + drop), 0)
