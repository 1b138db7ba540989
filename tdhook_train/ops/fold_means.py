"""Means over folds of scores of what was predicted elsewhere, by the probe of another step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tdhook_train.ops.ridge import constant

__all__ = ["mean_balanced_accuracy", "mean_r2"]


def mean_r2(predicted: Tensor, truth: Tensor, folds: Tensor) -> Tensor:
    """Return R², mean over the folds in which a target varies; NaN where there is none.

    Args:
        predicted: ``[..., n, target]``.
        truth: ``[n, target]``.
        folds: fold of each row, ``[n]``; -1 in none.
    """
    each = []
    for fold in folds[folds >= 0].unique().tolist():
        y = truth[folds == fold]
        spread = torch.where(constant(y), torch.nan, (y - y.mean(0)).square().sum(0))
        each.append(1 - (predicted[..., folds == fold, :] - y).square().sum(-2) / spread)
    return _over_folds(each, predicted)


def mean_balanced_accuracy(found: Tensor, truth: Tensor, folds: Tensor) -> Tensor:
    """Return the share found of each class held out, mean over classes and over the folds that hold out two or more.

    Args:
        found: classes, ``[..., n, target]``; NaN where nothing was said, which makes its fold count for nothing.
        truth: ``[n, target]``.
        folds: fold of each row, ``[n]``; -1 in none.
    """
    each = []
    for fold in folds[folds >= 0].unique().tolist():
        says, y = found[..., folds == fold, :], truth[folds == fold]
        of_targets = [_balanced(says[..., t], y[:, t]) for t in range(y.shape[1])]
        each.append(torch.stack(of_targets, -1))
    return _over_folds(each, found)


def _balanced(found: Tensor, truth: Tensor) -> Tensor:
    classes, y = truth.unique(return_inverse=True)
    hot = functional.one_hot(y, len(classes)).double()  # [n, class]
    share = ((found == truth).double() @ hot / hot.sum(0)).mean(-1)
    return torch.where(found.isnan().any(-1) | torch.tensor(len(classes) < 2), torch.nan, share)


def _over_folds(each: list[Tensor], like: Tensor) -> Tensor:
    if not each:
        return like.new_full((*like.shape[:-2], like.shape[-1]), torch.nan, dtype=torch.float64)
    return torch.stack(each).nanmean(0)
