"""How well predicted classes fit the true ones: balanced accuracy, area under the ROC curve, log-loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tdhook_train.errors import TargetError

__all__ = ["MAX_CLASSES", "SCORES", "areas", "class_scores", "classes_of", "fold_scores", "pooled_scores", "recalls"]

SCORES = ("balanced_accuracy", "auc", "log_loss")
MAX_CLASSES = 64


def classes_of(name: str, target: Tensor, whose: str) -> Tensor:
    """Return the classes of a target, in order.

    Args:
        name: of the target.
        target: a class of each row, ``[n]``.
        whose: the method that asks.

    Raises:
        TargetError: they are no whole numbers or booleans, or more than 64.
    """
    if target.is_floating_point() or target.is_complex():
        raise TargetError(
            f"target {name!r} is {target.dtype}, and {whose} tells classes apart: give whole numbers or booleans, or "
            "use a probe for quantities, such as RidgeProbe"
        )
    classes = target.unique()
    if len(classes) > MAX_CLASSES:
        raise TargetError(
            f"target {name!r} has {len(classes)} classes, and {whose} takes up to {MAX_CLASSES}: group them, or take "
            "them as quantities, with a probe such as RidgeProbe"
        )
    return classes


def fold_scores(logits: Tensor, y: Tensor, folds: Tensor, fitted: Tensor) -> tuple[Tensor, Tensor]:
    """Score what was predicted of held-out rows, fold by fold.

    Args:
        logits: as for :func:`class_scores`.
        y: as for :func:`class_scores`; every fold has the same classes in every shift.
        folds: fold of each row, ``[n]``.
        fitted: whether a fold could be fitted to a target, ``[f, t]``.

    Returns:
        The scores, ``[3, b, t, s]``, as the mean over folds, and which folds it is over, ``[f, t]``: those that were
        fitted and hold out two classes or more. NaN where none is left.
    """
    total = counted = torch.zeros((), dtype=torch.float64, device=logits.device)
    used = []
    for fold in range(len(fitted)):
        rows = (folds == fold).nonzero()[:, 0].to(logits.device)
        truth = y[rows]
        keep = fitted[fold] & (truth[:, :, 0] != truth[0, :, 0]).any(0)
        scores = class_scores(logits[:, rows], truth)
        total = total + torch.where(keep[:, None], scores, 0.0)
        counted = counted + keep.double()
        used.append(keep)
    return total / counted[:, None], torch.stack(used)


def pooled_scores(logits: Tensor, y: Tensor, folds: Tensor, fitted: Tensor) -> Tensor:
    """Score the held-out rows of all folds that were fitted together, as :func:`fold_scores`: ``[3, b, t, s]``."""
    of_each = [_pooled(logits[:, :, [t]], y[:, [t]], fitted[:, t].cpu()[folds]) for t in range(y.shape[1])]
    return torch.cat(of_each, 2)


def _pooled(logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    if not rows.any():
        return logits.new_full((3, len(logits), *y.shape[1:]), torch.nan, dtype=torch.float64)
    rows = rows.to(logits.device)
    return class_scores(logits[:, rows], y[rows])


def class_scores(logits: Tensor, y: Tensor) -> Tensor:
    """Score predicted classes: balanced accuracy, AUC and log-loss.

    Args:
        logits: ``[b, n, t, s, k]``; k is 1 for two classes (the logit of the second), or the number of classes.
        y: number of each row's class, ``[n, t, s]``.

    Returns:
        ``[3, b, t, s]``, float64. Balanced accuracy is the mean over classes present of the share of their rows that
        is found; AUC the mean over classes present of the area for that class against the rest, by its probability
        (NaN where there is one class); log-loss the mean over rows.
    """
    many = logits.shape[-1] > 1
    hot = functional.one_hot(y, logits.shape[-1] if many else 2).to(logits.dtype)  # [n, t, s, c]
    if many:
        chances = logits.log_softmax(-1)
        loss = -torch.einsum("bntsk,ntsk->bnts", chances, hot)
        found, ranked, of = logits.argmax(-1) == y, logits.softmax(-1), hot
    else:
        loss = functional.softplus(torch.where(y.bool(), -logits[..., 0], logits[..., 0]))
        found, ranked, of = (logits[..., 0] > 0) == y.bool(), logits, hot[..., 1:]
    return torch.stack([recalls(found, hot), areas(ranked, of), loss.double().mean(1)]).double()


def recalls(found: Tensor, hot: Tensor) -> Tensor:
    """Return the balanced accuracy: the mean over classes present of the share of their rows that is found.

    Args:
        found: whether a row was put in its own class, ``[b, n, t, s]``.
        hot: whether a row lies in a class, 0 or 1, ``[n, t, s, c]``.
    """
    return (torch.einsum("bnts,ntsc->btsc", found.to(hot), hot) / hot.sum(0)).nanmean(-1)


def areas(ranked: Tensor, hot: Tensor) -> Tensor:
    """Return the mean over classes present of the area under the ROC curve of each against the rest.

    Args:
        ranked: what puts the rows in the order of a class, ``[b, n, t, s, c]``.
        hot: whether a row lies in that class, 0 or 1, ``[n, t, s, c]``.
    """
    return torch.stack([_area(ranked[..., k], hot[..., k]) for k in range(hot.shape[-1])], -1).nanmean(-1)


def _area(score: Tensor, hot: Tensor) -> Tensor:
    """Return the share of pairs (in the class, not in it) that the score puts in order, ties by half: ``[b, t, s]``."""
    ordered, order = score.movedim(1, -1).contiguous().sort(-1)  # [b, t, s, n]
    inside = hot.movedim(0, -1).expand_as(ordered).gather(-1, order)
    outside = 1 - inside
    below = outside.cumsum(-1)  # whole numbers: exact up to 2²⁴ rows in float32
    ties = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    if ties.any():
        tied, ranks = ordered[ties], below[ties]
        last = torch.searchsorted(tied, tied, right=True) - 1
        first = torch.searchsorted(tied, tied)
        below[ties] = (ranks.gather(-1, last) + ranks.gather(-1, first) - outside[ties].gather(-1, first)) / 2
    n = inside.sum(-1).double()
    return (inside * below).sum(-1, dtype=torch.float64) / (n * (inside.shape[-1] - n))
