"""Splitting rows by trajectory, and shifting them within trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook_train.errors import GroupsError

__all__ = ["circular_shifts", "fold_of", "in_blocks", "starts_and_lengths"]


def _hash(ids: Tensor) -> Tensor:
    """Mix 64-bit integers (the finaliser of splitmix64), the same on every machine."""
    z = ids.to(torch.int64) + -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def fold_of(groups: Tensor, folds: int) -> Tensor:
    """Assign each row the fold of its group.

    Groups are put in the order of their hash and dealt out in turn, so that no fold is empty and none holds two
    groups more than another. With fewer groups than folds, each group is a fold (leave one group out).

    Args:
        groups: integer of each row's trajectory, ``[n]``.
        folds: number of folds.

    Returns:
        Fold of each row, ``[n]``, int64, from 0.

    Raises:
        GroupsError: fewer than two groups.
    """
    ids, inverse = torch.unique(groups, return_inverse=True)
    if len(ids) < 2:
        raise GroupsError(
            f"cross-validation needs rows of at least 2 groups, got {len(ids)}: collect more trajectories, or take "
            'rows as independent with ProbeSet(td, groups="rows")'
        )
    rank = torch.empty(len(ids), dtype=torch.int64)
    rank[torch.argsort(_hash(ids), stable=True)] = torch.arange(len(ids))
    return (rank % folds)[inverse]


def in_blocks(groups: Tensor) -> bool:
    """Whether the rows of each group lie together."""
    return int((groups[1:] != groups[:-1]).sum()) + 1 == len(torch.unique(groups))


def starts_and_lengths(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each row, where its block of equal groups begins and how long it is."""
    new = torch.ones(len(groups), dtype=torch.bool)
    new[1:] = groups[1:] != groups[:-1]
    block = new.cumsum(0) - 1
    starts = new.nonzero().flatten()
    lengths = torch.diff(starts, append=torch.tensor([len(groups)]))
    return starts[block], lengths[block]


def circular_shifts(groups: Tensor, shifts: int, generator: torch.Generator | None) -> Tensor:
    """Draw row orders that turn each trajectory by a random number of steps.

    The order of time within a trajectory, and so its autocorrelation, stays; which value goes with which activation
    does not. A trajectory of one row cannot be turned.

    Args:
        groups: trajectory of each row, in blocks and in time order, ``[n]``.
        shifts: how many orders.
        generator: where the randomness comes from; the same numbers each time where none is given.

    Returns:
        Row indices ``[shifts, n]``.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    start, length = starts_and_lengths(groups)
    first = torch.unique(start, return_inverse=True)[1]
    draw = torch.rand(shifts, int(first.max()) + 1, generator=generator, dtype=torch.float64)[:, first]
    turn = 1 + (draw * (length - 1)).long()  # 1 … length-1, for each trajectory its own
    place = torch.arange(len(groups)) - start
    return start + (place + turn) % length
