"""The greatest values of each unit: of one batch, and of two together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Top", "at_their_best", "together", "top_of"]


class Top(NamedTuple):
    """The greatest values, in descending order along the last dimension: NaN, row -1 and position -1 where none is.

    Args:
        value: ``[..., k]``.
        row: where each is from, ``[..., k]``, int64.
        position: within its row, ``[..., k]``, int64.
    """

    value: Tensor
    row: Tensor
    position: Tensor


def at_their_best(value: Tensor, row_axis: int, unit_axis: int) -> tuple[Tensor, Tensor]:
    """Take each unit in each row at the position where it is greatest, the first of several.

    Args:
        value: an activation; what is not finite counts as nothing.
        row_axis: along which its rows lie.
        unit_axis: along which its units lie; a value of one dimension has one unit.

    Returns:
        Values, NaN where nothing is finite, and positions, counted through the other dimensions in their order:
        ``[row, unit]`` each.
    """
    rows = value.unsqueeze(1) if value.ndim == 1 else value.movedim((row_axis, unit_axis), (0, 1))
    flat = rows.flatten(2) if rows.ndim > 2 else rows.unsqueeze(2)
    best, position = torch.where(flat.isfinite(), flat, -torch.inf).max(2)
    return torch.where(best.isfinite(), best, torch.nan), position


def top_of(value: Tensor, position: Tensor, k: int) -> Top:
    """Return the k greatest rows of each unit; of equal ones the first rows.

    Args:
        value: ``[row, unit]``; NaN is passed over.
        position: ``[row, unit]``.
        k: how many.

    Returns:
        ``[unit, k]`` each.
    """
    row = torch.arange(len(value), device=value.device)[:, None].expand_as(value)
    return _first(Top(value.mT, row.mT, position.mT), k)


def together(one: Top, other: Top) -> Top:
    """Return the k greatest of two times k; of equal ones those of the first, whose rows come before."""
    both = Top(*(torch.cat([a, b], -1) for a, b in zip(one, other, strict=True)))
    return _first(both, one.value.shape[-1])


def _first(found: Top, k: int) -> Top:
    order = found.value.nan_to_num(-torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    value, row, position = (part.gather(-1, order) for part in found)
    short = k - order.shape[-1]
    if short:
        value = torch.nn.functional.pad(value, (0, short), value=torch.nan)
        row, position = (torch.nn.functional.pad(part, (0, short), value=-1) for part in (row, position))
    nothing = value.isnan()
    return Top(value, row.masked_fill(nothing, -1), position.masked_fill(nothing, -1))
