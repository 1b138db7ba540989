"""Batches as rows in the order of time, told apart by trajectory."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_train.errors import GroupsError, KeyMissingError, SettingsError, did_you_mean
from tdhook_train.keys import path_of

__all__ = ["Groups", "copied", "groups_of", "in_rows", "whole"]

_TRAJECTORY_KEYS: tuple[NestedKey, ...] = (("collector", "traj_ids"), "traj_ids")
_DONE_KEYS: tuple[NestedKey, ...] = (("next", "done"), "done")

Groups = Any  # a tensor, a key of the batch, "auto" or "rows"


def copied(batch: TensorDictBase) -> TensorDictBase:
    """Copy a batch of a collector, which may use its memory again; what it keeps for itself is left out."""
    private = [key for key in batch.keys(include_nested=True) if any(p.startswith("_") for p in path_of(key))]
    return batch.exclude(*private).detach().clone()


def in_rows(td: TensorDictBase) -> TensorDictBase:
    """Lay environments end to end, each in the order of time."""
    if td.batch_dims == 0:
        raise SettingsError("a probe set needs a batch of rows; the TensorDict has batch_size=[]")
    if 0 in td.batch_size:
        raise SettingsError(f"there is nothing to measure on: the TensorDict has batch_size={list(td.batch_size)}")
    return td.detach().reshape(-1).clone()


def groups_of(td: TensorDictBase, wanted: Groups, time: int | None = None) -> Tensor | None:
    """Return the trajectory of each row, or None where nothing says so.

    Args:
        td: ``[rows]``.
        wanted: a tensor, a key of the batch, ``"auto"`` or ``"rows"``.
        time: rows of each environment, where several were laid end to end.
    """
    if isinstance(wanted, Tensor):
        if wanted.numel() != len(td):
            raise GroupsError(f"groups has {wanted.numel()} entries for {len(td)} rows")
        return wanted.reshape(-1).cpu().to(torch.int64)
    if wanted == "rows":
        return torch.arange(len(td))
    keys = _TRAJECTORY_KEYS if wanted == "auto" else (wanted,)
    for key in keys:
        if key in td.keys(include_nested=True):
            return td.get(key).reshape(len(td), -1)[:, 0].cpu().to(torch.int64)
    if wanted != "auto":
        raise KeyMissingError(
            f"groups={wanted!r} is no key of the probe set{did_you_mean(str(wanted), map(str, td.keys()))}"
        )
    done = _done(td)
    if done is None:
        return None
    # a new trajectory begins on the row after a done flag, and with each environment
    begins = torch.cat([torch.zeros(1, dtype=torch.bool), done[:-1].cpu()])
    begins[:: time or len(td)] = True
    return begins.long().cumsum(0) - 1


def whole(joined: TensorDictBase) -> tuple[TensorDictBase, Tensor | None]:
    """Lay ``[..., time]`` out in rows without the trajectories that are cut off at the end, unless all are.

    Returns:
        The rows, and the trajectory of each, where it is known.
    """
    td = in_rows(joined)
    groups, ended = groups_of(td, "auto", joined.shape[-1]), _done(td)
    if groups is None or ended is None:
        return td, groups
    keep = torch.isin(groups, groups[ended.cpu()])
    return (td[keep], groups[keep]) if keep.any() else (td, groups)


def _done(td: TensorDictBase) -> Tensor | None:
    key = next((key for key in _DONE_KEYS if key in td.keys(include_nested=True)), None)
    return None if key is None else td.get(key).reshape(len(td), -1).any(1)
