"""Centred kernel alignment of linear kernels, without bias, of many layers at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_train.ops.units import evenly_spaced

__all__ = ["NOT_FINITE", "SAME", "TOO_FEW", "Representations", "thinned"]

_FEWEST = 4  # rows: what the unbiased estimate divides by is n (n - 3)
_ENOUGH = 8  # rows a unit
TOO_FEW, SAME, NOT_FINITE = 1, 2, 3  # why a layer cannot be compared


def thinned(value: Tensor, rows: int) -> Tensor:
    """Keep at most so many of the rows, spread evenly."""
    return value[evenly_spaced(len(value), rows).to(value.device)]


class Representations:
    """What several layers give out on the same inputs, ready to be compared: layers of one shape lie in one batch.

    A layer with more units than rows is turned, by the R of a QR decomposition, into as many columns as rows with the
    same kernel, so that no product is larger than the smaller side of the activation.

    Args:
        values: ``[rows, units]`` of each layer.
        counts: how many rows each layer had before some were chosen: only rows of like count are of like inputs.
    """

    def __init__(self, values: Sequence[Tensor], counts: Sequence[int]) -> None:
        self.reasons = torch.zeros(len(values), dtype=torch.int8)
        self.few = torch.tensor([len(value) < _ENOUGH * value.shape[1] for value in values], dtype=torch.int8)
        self._own = torch.zeros(len(values), dtype=torch.float64)
        self._counts = torch.tensor(counts)
        self._batches: list[_Batch] = []
        for index in _alike([(count, *value.shape) for count, value in zip(counts, values, strict=True)]):
            batch, reasons = _prepared(torch.stack([values[i] for i in index.tolist()]), index)
            if batch.rows >= _FEWEST:
                shared = _shared(batch.x, batch.x)
                own = _hsic(shared, batch.norms, batch.norms)
                # 0 where the rows but one are equal: no pair of rows tells anything
                reasons[(reasons == 0) & (own <= 1e-12 * shared).cpu()] = SAME
                self._own[index] = own.cpu()
            self.reasons[index] = reasons
            self._batches.append(batch)

    def __len__(self) -> int:
        """How many layers."""
        return len(self.reasons)

    def to(self, other: Representations) -> Tensor:
        """Compare each layer with the same layer elsewhere: ``[layer]``, NaN where one of the two cannot be."""
        cross = torch.full_like(self._own, torch.nan)
        for one, two in zip(self._batches, other._batches, strict=True):
            if one.rows >= _FEWEST:
                cross[one.index] = _hsic(_shared(one.x, two.x), one.norms, two.norms).cpu()
        valid = (self.reasons == 0) & (other.reasons == 0)
        return torch.where(valid, cross / (self._own * other._own).sqrt(), torch.nan)

    def among(self) -> tuple[Tensor, Tensor]:
        """Compare each layer with each: ``[layer, layer]``, and whether the two have the same rows."""
        cross = torch.full((len(self), len(self)), torch.nan, dtype=torch.float64)
        for k, one in enumerate(self._batches):
            for two in self._batches[k:]:
                if self._counts[one.index[0]] == self._counts[two.index[0]] and one.rows >= _FEWEST:
                    found = _hsic(_shared_by_all(one.x, two.x), one.norms[:, None], two.norms).cpu()
                    cross[one.index[:, None], two.index] = found
                    cross[two.index[:, None], one.index] = found.mT
        valid = (self.reasons[:, None] == 0) & (self.reasons == 0)
        scale = (self._own[:, None] * self._own).sqrt()
        return torch.where(valid, cross / scale, torch.nan), self._counts[:, None] == self._counts


@dataclass(frozen=True)
class _Batch:
    """Layers of one shape: what they give out, centred ``[layer, rows, columns]``, and ``‖row‖²`` ``[layer, rows]``."""

    index: Tensor
    x: Tensor
    norms: Tensor

    @property
    def rows(self) -> int:
        return self.x.shape[1]


def _alike(shapes: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    places: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(shapes):
        places.setdefault(shape, []).append(i)
    return map(torch.tensor, places.values())


def _prepared(values: Tensor, index: Tensor) -> tuple[_Batch, Tensor]:
    """Centre ``[layer, rows, units]`` in float64, scaled to 1, no wider than long; and why some cannot be compared."""
    rows, units = values.shape[1:]
    x = values.detach().double()
    mean = x.mean(1, keepdim=True)
    finite = mean.isfinite().all(-1)[:, 0]  # NaN and infinity survive a sum
    if not finite.all():
        mean, x = mean.nan_to_num(0, 0, 0), torch.where(finite[:, None, None], x, 0)
    x = x - mean
    spread = x.abs().amax(1)
    rounding = 4 * torch.finfo(values.dtype).eps * (mean[:, 0].abs() + spread)
    same = (spread <= rounding).all(1)  # a spread below rounding is rounding
    largest = spread.amax(1)
    x /= torch.where(largest > 0, largest, 1.0)[:, None, None]
    reasons = torch.where(finite, torch.where(same, SAME, 0), NOT_FINITE).to(torch.int8)
    if rows < _FEWEST:
        reasons = torch.full_like(reasons, TOO_FEW)
    if units > rows:
        x = torch.linalg.qr(x.mT, mode="r").R.mT  # X' = QR, so XX' = R'R
    return _Batch(index, x, torch.linalg.vector_norm(x, dim=-1).square()), reasons.cpu()


def _shared(x: Tensor, y: Tensor) -> Tensor:
    """``‖X'Y‖²``, layer by layer: ``[layer]``."""
    return torch.linalg.vector_norm(x.mT @ y, dim=(-2, -1)).square()


def _shared_by_all(x: Tensor, y: Tensor) -> Tensor:
    """``‖X'Y‖²`` of each layer with each: ``[layer, layer]``, one product for each of X."""
    found = x.new_empty(len(x), len(y))
    beside = y.movedim(0, 1).flatten(1)  # [rows, layer × column]
    for i, one in enumerate(x):
        first = i if y is x else 0  # the others are known by symmetry
        products = (one.mT @ beside[:, first * y.shape[2] :]).unflatten(1, (-1, y.shape[2]))  # [column, layer, column]
        found[i, first:] = shared = torch.linalg.vector_norm(products, dim=(0, 2)).square()
        if y is x:
            found[first:, i] = shared
    return found


def _hsic(shared: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The unbiased HSIC of the linear kernels of centred X and Y, times n (n - 3).

    Song et al. 2012, eq. 5, with K, L the kernels less their diagonals a, b:
    ``tr(KL) + (1'K1)(1'L1) / ((n - 1)(n - 2)) - 2 / (n - 2) 1'KL1``. Subtracting the mean of the features changes
    none of it, and then ``K1 = -a``; ``tr(KL) = ‖X'Y‖² - a·b``.

    Args:
        shared: ``‖X'Y‖²``.
        a: ``‖row‖²`` of X, rows last.
        b: that of Y.
    """
    n = a.shape[-1]
    return shared - n / (n - 2) * (a * b).sum(-1) + a.sum(-1) * b.sum(-1) / ((n - 1) * (n - 2))
