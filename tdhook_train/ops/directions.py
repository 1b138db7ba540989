"""Concept directions: where the activations of one class of rows lie, seen from the others."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook_train.ops.logistic import LogisticDesign

__all__ = ["between_means", "by_logistic", "over_positions", "unit"]


def unit(direction: Tensor) -> Tensor:
    """Bring directions ``[..., unit]`` to length 1; one of length 0 stays as it is."""
    length = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    return direction / torch.where(length > 0, length, 1.0)


def over_positions(value: Tensor, axis: int) -> Tensor:
    """Bring an activation to ``[row, unit]``: the mean over all positions but those along ``axis``."""
    last = value.movedim(axis, -1) if value.ndim > 1 else value[:, None]
    return last.flatten(1, -2).mean(1) if last.ndim > 2 else last


def between_means(x: Tensor, labels: Tensor) -> Tensor:
    """Return the unit direction from the mean of the other rows to that of the labelled: ``[labelling, unit]``.

    Args:
        x: activations, ``[row, unit]``.
        labels: which rows show the concept, ``[row, labelling]``.
    """
    inside = labels.double()
    share = inside / inside.sum(0) - (1 - inside) / (1 - inside).sum(0)
    return unit(share.T @ x.double())


def by_logistic(x: Tensor, labels: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Return the unit normals of logistic regressions, towards the labelled rows, and which fits converged.

    Args:
        x: activations, ``[row, unit]``.
        labels: which rows show the concept, ``[row, labelling]``.
        c: weight of the summed log-loss against ½‖w‖².

    Returns:
        ``[labelling, unit]`` and ``[labelling]``.
    """
    basis = None
    if x.shape[1] > len(x):  # the penalised normal lies among the differences of rows: as many as rows, not units
        x = x.double() - x[0].double()
        basis = torch.linalg.qr(x.T).Q
        x = x @ basis
    # A design fits each fold's complement: of the rows twice, each copy is a fit to all rows.
    folds = torch.arange(2).repeat_interleave(len(x))
    fit = LogisticDesign([x.repeat(2, 1)], folds, c).fit(labels.long().repeat(2, 1), 2)
    weights = fit.weights[0, 0, :, 0, 0]
    return unit(weights if basis is None else weights @ basis.T), fit.converged[0, 0, :, 0]
