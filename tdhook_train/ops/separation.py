"""How well directions tell two sides apart, on rows that they were not found from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_train.ops.classification import class_scores

__all__ = ["Scores", "cohens_d", "held_out_scores"]


@dataclass(frozen=True)
class Scores:
    """Of each way of labelling the rows, ``[labelling]``, float64; NaN where nothing could be scored.

    Args:
        separation: how far apart the sides lie, in standard deviations within them (Cohen's d).
        accuracy: mean over the sides of the share of rows on their side of the midpoint: .5 is chance.
        auc: share of pairs of one row from each side that lie in order, ties by half.
    """

    separation: Tensor
    accuracy: Tensor
    auc: Tensor

    @classmethod
    def missing(cls, labellings: int) -> Scores:
        """Return scores that are not known."""
        return cls(*torch.full((3, labellings), torch.nan, dtype=torch.float64))


def cohens_d(values: Tensor, marks: Tensor) -> Tensor:
    """Return the difference of the means of two sides over their pooled standard deviation; NaN for fewer than 3 rows.

    Args:
        values: ``[row, column]``.
        marks: which are on the positive side, in a shape that broadcasts with the values.
    """
    inside = marks.to(values).expand_as(values)
    plus, minus = ((side * values).sum(0) / side.sum(0) for side in (inside, 1 - inside))
    within = (values - torch.where(marks, plus, minus)).square().sum(0) / (len(values) - 2)
    return (plus - minus) / within.sqrt()


def held_out_scores(x: Tensor, marks: Tensor, folds: Tensor, found: Callable[[Tensor, Tensor], Tensor]) -> Scores:
    """Find directions without the rows of each fold, and score these rows, those of all folds together.

    A row is scored by its place along the direction from the midpoint between the means of the sides, both of the
    other rows. Where one side lies in a single fold there is nothing to find without it: NaN.

    Args:
        x: activations, ``[row, unit]``, float64.
        marks: which rows are on the positive side, ``[row, labelling]``.
        folds: fold of each row, ``[row]``.
        found: returns unit directions ``[labelling, unit]`` from activations and marks of some rows.
    """
    places = x.new_full(marks.shape, torch.nan)
    for fold in folds.unique():
        rows = folds == fold
        inside = marks[~rows].to(x)
        kept = (inside.sum(0) > 0) & (inside.sum(0) < len(inside))
        if not kept.any():
            continue
        inside = inside[:, kept]
        directions = found(x[~rows], marks[~rows][:, kept])
        weights = (inside / inside.sum(0) + (1 - inside) / (1 - inside).sum(0)) / 2
        middle = (weights * (x[~rows] @ directions.T)).sum(0)
        places[rows.nonzero(), kept.nonzero()[:, 0]] = x[rows] @ directions.T - middle
    return _scores(places.cpu(), marks.cpu())


def _scores(places: Tensor, marks: Tensor) -> Scores:
    found = places.new_full((3, marks.shape[1]), torch.nan)
    columns = places.isfinite().all(0)
    if columns.any():
        place, mark = places[:, columns], marks[:, columns]
        accuracy, auc, _ = class_scores(place[None, :, :, None, None], mark.long()[..., None])[:, 0, :, 0]
        found[:, columns] = torch.stack([cohens_d(place, mark), accuracy, auc])
    return Scores(*found)
