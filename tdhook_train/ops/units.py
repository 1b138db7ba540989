"""Activations as rows × units, whatever the layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook_train.errors import GroupsError

__all__ = ["as_rows", "by_row", "dormancy", "evenly_spaced", "held", "padded", "pooled"]


def held(value: Tensor, units: Sequence[int], to: Tensor | float | Sequence[float], axis: int) -> Tensor:
    """Return a copy of an activation in which some of its units, along ``axis``, have a fixed value or fixed values."""
    last = value.movedim(axis, -1).clone()
    last[..., list(units)] = torch.as_tensor(to, dtype=value.dtype, device=value.device)
    return last.movedim(-1, axis)


def as_rows(value: Tensor, axis: int = -1) -> Tensor:
    """Bring an activation to ``[rows, units]``: every position that is not along ``axis`` counts as a row."""
    if value.ndim <= 1:
        return value.reshape(-1, 1)
    value = value.movedim(axis, -1)
    return value.reshape(-1, value.shape[-1])


def by_row(value: Tensor, batch: Sequence[int], axes: tuple[int, int], where: str) -> Tensor:
    """Bring an activation to ``[row, *position, unit]``.

    Args:
        value: what a layer gave out.
        batch: the size of the batch; its rows are numbered through.
        axes: along which dimension the units lie, and at which the rows begin.
        where: names method and layer.

    Raises:
        GroupsError: there is no value for each row.
    """
    unit, row = axes
    if value.ndim <= row or value.movedim(row, 0).shape[: len(batch)] != tuple(batch):
        raise GroupsError(
            f"{where} gives {tuple(value.shape)} for rows {list(batch)}; name layers with one row a sample"
        )
    units = value.movedim(unit, -1) if value.ndim > len(batch) else value[..., None]
    return units.movedim(row, 0).flatten(0, len(batch) - 1)


def dormancy(value: Tensor, axis: int = -1) -> Tensor:
    """Score the units of an activation: ``E|h_i| / mean_k E|h_k|``; 0 in one that is all zero, NaN in no finite one."""
    rows = as_rows(value, axis)
    activity = torch.linalg.vector_norm(rows, ord=1, dim=0) / len(rows)
    mean = activity.mean()
    if not mean.isfinite():
        return torch.full_like(activity, torch.nan)  # beside an infinite unit all others would seem asleep
    return activity / mean if mean > 0 else torch.zeros_like(activity)


def pooled(shares: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """Return the share of all units, from the shares ``[...]`` of layers; those whose share is NaN are left out."""
    share = torch.stack(list(shares))
    width = torch.tensor(widths, dtype=share.dtype, device=share.device).view(-1, *[1] * (share.ndim - 1))
    known = share.isfinite()
    return (share * width).where(known, 0.0).sum(0) / (width * known).sum(0)  # NaN where no layer is known


def padded(values: Sequence[Tensor], fill: float = torch.nan) -> Tensor:
    """Stack tensors that differ in their first dimension, filling the short ones at the end."""
    longest = max(len(value) for value in values)
    out = values[0].new_full((len(values), longest, *values[0].shape[1:]), fill)
    for i, value in enumerate(values):
        out[i, : len(value)] = value
    return out


def evenly_spaced(n: int, wanted: int | None) -> Tensor:
    """Return the indices of at most ``wanted`` rows spread evenly over ``n``."""
    if wanted is None or wanted >= n:
        return torch.arange(n)
    return torch.arange(wanted) * n // wanted
