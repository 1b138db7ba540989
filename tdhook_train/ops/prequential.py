"""Prequential code of classes: bits of each row, by a model of the rows before it.

Rows are sent part by part; the model of a part is a logistic regression fitted to all parts before. It knows the
classes that it has seen, S of K, in n rows. One that it has not seen has the probability that Laplace's rule of
succession gives it, 1 / (n + K), and the others share the rest, (n + S) / (n + K), as the regression says. So the code
is that of the regression once every class was seen, and uniform where nothing was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from tdhook_train.ops.logistic import LogisticDesign

__all__ = ["parts_of", "prequential_bits"]

_LN2 = 0.6931471805599453


def parts_of(groups: Tensor, portions: Sequence[float], seed: int) -> Tensor:
    """Put rows into an order and cut it into parts, each group whole.

    Args:
        groups: trajectory of each row, ``[n]``.
        portions: how much of the rows is sent by the end of each part, from 0 to 1, rising to 1; a part ends with the
            group in which its portion is reached, and parts without a group fall away.
        seed: of the order of the groups.

    Returns:
        Part of each row, ``[n]``, from 0.
    """
    ids, inverse, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    sent = sizes[order].cumsum(0)  # by the end of each group, in their order
    # in whole rows, of which 0.1 % of 1,000 is 1 and not a little more
    wanted = torch.tensor([round(portion * len(groups), 6) for portion in portions], dtype=torch.float64)
    ends = sent[torch.searchsorted(sent.double(), wanted).clamp(max=len(sent) - 1)].unique()
    of_group = torch.empty_like(order)
    of_group[order] = torch.searchsorted(ends, sent)
    return of_group[inverse]


def prequential_bits(
    blocks: Sequence[Tensor], y: Tensor, classes: int, parts: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """Code every target by every block of features.

    Args:
        blocks: features, each ``[n, width]``.
        y: number of each row's class, ``[n, target]``, each number from 0 to ``classes`` - 1 present.
        classes: how many classes each of the targets has, 2 or more.
        parts: part of each row, ``[n]``, every part from 0 to P-1 present.
        c: weight of the summed loss against ½‖w‖² in every fit.

    Returns:
        Bits of each row, ``[block, n, target]``, and whether every fit converged, ``[block, target]``; on the CPU.
    """
    bits, sure = _fitted_bits(blocks, y, parts, c, _before(int(parts.max()) + 1))
    sizes = torch.bincount(parts)
    before = (sizes.cumsum(0) - sizes)[parts].double()  # how many rows were sent before the part of each
    for t in range(y.shape[1]):
        for run in _runs(y[:, t], parts, classes):
            rows = (parts >= run.first) & (parts <= run.last)
            known, converged = _bits_of_seen(blocks, y[:, t], parts, c, run)
            n, seen = before[rows], len(run.seen)
            new = ~torch.isin(y[rows, t], run.seen)
            share = torch.where(new, 1, n + seen) / (n + classes)
            bits[:, rows, t] = torch.where(new, 0, known[:, rows[parts <= run.last]]) - share.log2()
            sure[:, t] &= converged
    return bits, sure


@dataclass(frozen=True)
class _Run:
    """Parts one after another before which the same classes were seen, and not all of them."""

    first: int
    last: int
    seen: Tensor


def _runs(y: Tensor, parts: Tensor, classes: int) -> Iterator[_Run]:
    debut = torch.tensor([int(parts[y == one].min()) for one in range(classes)])  # the part that shows a class first
    starts = [0, *(debut.unique() + 1).tolist()]
    for first, after in pairwise(starts):
        seen = (debut < first).nonzero()[:, 0]
        yield _Run(first, after - 1, seen)


def _bits_of_seen(blocks: Sequence[Tensor], y: Tensor, parts: Tensor, c: float, run: _Run) -> tuple[Tensor, Tensor]:
    """Code the rows of a run as if its classes were all there are: bits ``[block, rows up to its end]``."""
    rows = parts <= run.last
    if len(run.seen) < 2:
        return torch.zeros(len(blocks), int(rows.sum()), dtype=torch.float64), torch.ones(len(blocks), dtype=torch.bool)
    trains = _before(run.last + 1)
    trains[: run.first] = 0  # these parts are no part of the run: no fit is needed
    # a class that is new in the last part is trained on by none of these fits, so any number will do for it
    number = torch.where(torch.isin(y[rows], run.seen), torch.searchsorted(run.seen, y[rows]), 0)
    bits, sure = _fitted_bits(
        [block[rows.to(block.device)] for block in blocks], number[:, None], parts[rows], c, trains
    )
    return bits[..., 0], sure[:, 0]


def _fitted_bits(blocks: Sequence[Tensor], y: Tensor, parts: Tensor, c: float, trains: Tensor) -> tuple[Tensor, Tensor]:
    """Code each part by the fit of its number; 0 where there is none."""
    fit = LogisticDesign(blocks, parts, c, trains).fit(y.to(blocks[0].device), int(y.max()) + 1)
    z = fit.held_out[..., 0, :].cpu()
    logits = functional.pad(z, (1, 0)) if z.shape[-1] == 1 else z
    nats = -logits.log_softmax(-1).gather(-1, y.expand(len(z), -1, -1)[..., None])[..., 0]
    there = fit.fitted.cpu()[parts]  # [n, t]
    return torch.where(there, nats / _LN2, 0), fit.converged.cpu().all(3).all(1)


def _before(parts: int) -> Tensor:
    return torch.ones(parts, parts).tril(-1)
