"""Scores of what was predicted of rows held out, fold by fold and of all rows together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tdhook_train.ops.classification import areas, recalls
from tdhook_train.ops.ridge import constant

__all__ = ["Predicted", "empty", "mean_scores", "scores_of", "stacked", "varying"]


@dataclass
class Predicted:
    """What fits say of rows that they did not see, the fits of several targets side by side.

    Args:
        value: the quantity, or the number of the class, ``[..., n, t]``, float64.
        ranks: what puts rows in the order of a class, ``[..., n, t, c]``: one number for two classes (for the second),
            else one a class; None where there is nothing to order by.
        chances: probability of each class, ``[..., n, t, k]``; None where there is none.
    """

    value: Tensor
    ranks: Tensor | None = None
    chances: Tensor | None = None

    def parts(self) -> list[Tensor]:
        """What there is."""
        return [part for part in (self.value, self.ranks, self.chances) if part is not None]

    def put(self, rows: Tensor, held_out: Predicted) -> None:
        """Write what was predicted of some rows to their places."""
        for mine, given in zip(self.parts(), held_out.parts(), strict=True):
            mine[rows] = given.to(mine)

    def of_targets(self, index: Tensor) -> Predicted:
        """What was said of some of the targets."""
        axis = self.value.ndim - 1
        return _made([self], lambda parts: parts[0].index_select(axis, index))

    def finite(self) -> Tensor:
        """Whether all is finite, for each target: ``[..., t]``."""
        return torch.stack([_over_rows(part, self.value.ndim) for part in self.parts()]).all(0)


def _over_rows(part: Tensor, ndim: int) -> Tensor:
    finite = part.isfinite()
    return (finite.all(-1) if finite.ndim > ndim else finite).all(-2)


def empty(rows: int, like: Predicted) -> Predicted:
    """Return a place, on the CPU, for what will be predicted of all rows, zero so far."""
    return _made([like], lambda parts: torch.zeros((rows, *parts[0].shape[1:]), dtype=torch.float64))


def stacked(many: Sequence[Predicted]) -> Predicted:
    """Lay what was predicted from several blocks one before the other: ``[b, ...]``."""
    return _made(many, torch.stack)


def _made(many: Sequence[Predicted], make: Callable[[list[Tensor]], Tensor]) -> Predicted:
    ranks = [one.ranks for one in many if one.ranks is not None]
    chances = [one.chances for one in many if one.chances is not None]
    value = make([one.value for one in many])
    return Predicted(value, make(ranks) if ranks else None, make(chances) if chances else None)


def varying(y: Tensor, folds: Tensor) -> Tensor:
    """Whether each target takes more than one value within each fold: ``[f, t]``."""
    return torch.stack([~constant(y[folds == fold]) for fold in range(int(folds.max()) + 1)])


def mean_scores(names: Sequence[str], of: Predicted, y: Tensor, folds: Tensor, used: Tensor) -> Tensor:
    """Score what was predicted from several blocks of the rows held out, fold by fold.

    Args:
        names: the scores: ``"r2"``, or some of :data:`tdhook_train.ops.classification.SCORES`.
        of: what was predicted, ``[b, n, t]``.
        y: the truth, ``[n, t]``, float64; classes by number.
        folds: fold of each row, ``[n]``.
        used: whether a fold counts, ``[f]``: one that was fitted and holds out more than one value.

    Returns:
        The mean over the folds that count, ``[score, b, t]``.
    """
    each = [scores_of(names, of, y, folds == fold) for fold in used.nonzero()[:, 0].tolist()]
    return torch.stack(each).mean(0)


def scores_of(names: Sequence[str], of: Predicted, y: Tensor, rows: Tensor) -> Tensor:
    """Score some rows, ``[n]``, together, as :func:`mean_scores` does those of a fold."""
    value, truth = of.value[:, rows], y[rows]
    if names == ("r2",):
        spread = (truth - truth.mean(0)).square().sum(0)
        return (1 - (truth - value).square().sum(1) / spread)[None]
    missing = value.new_full((len(value), y.shape[1]), torch.nan)
    ranks = missing if of.ranks is None else _auc(of.ranks[:, rows], truth)
    loss = missing if of.chances is None else _log_loss(of.chances[:, rows], truth)
    every = {"balanced_accuracy": recalls((value == truth)[..., None], _hot(truth))[..., 0], "auc": ranks}
    return torch.stack([(every | {"log_loss": loss})[name] for name in names])


def _hot(y: Tensor, classes: int = -1) -> Tensor:
    return functional.one_hot(y.long(), classes).double()[:, :, None]  # [n, t, 1, k]


def _auc(ranks: Tensor, y: Tensor) -> Tensor:
    hot = _hot(y, max(2, ranks.shape[-1]))
    return areas(ranks[:, :, :, None], hot[..., 1:] if ranks.shape[-1] == 1 else hot)[..., 0]


def _log_loss(chances: Tensor, y: Tensor) -> Tensor:
    of_truth = chances.gather(-1, y.long()[None, ..., None].expand(len(chances), -1, -1, 1))[..., 0]
    # as in scikit-learn: a class held impossible that came all the same costs 36 nats, not infinity
    return -of_truth.clamp(min=torch.finfo(torch.float64).eps).log().mean(1)
