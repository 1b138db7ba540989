"""How alike an attribution is to what it was at the tick before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.explain import Found, Point
from tdhook_train.explain.judged import Judged, counted, in_one
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of
from tdhook_train.method import Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.likeness import cosine, cosine_by_chance, jaccard, spearman, varied
from tdhook_train.seen import inputs_hash, row_before

__all__ = ["Stability"]

_COMPARED, _NOTHING_BEFORE, _NO_RANKING = 0, 1, 2


@dataclass(frozen=True)
class Stability(Judged):
    """How alike the shares of the same rows are to those at the tick before, each less what chance would give.

    What chance gives is the mean over all orders of the features: 0 for rank correlations, but .64 or more for the
    cosine of shares that are all positive. Costs no more than the attribution; a row of the run holds the attribution,
    for the next tick to be compared with, which takes its size on disk.

    Args:
        of: see :class:`Judged`, as is ``reduction``.
        top: how many features the Jaccard index is of; at most as many as there are, of which all have 0.

    Writes:
        ``spearman`` [batch, target]: rank correlation of magnitudes. ``cosine``: of shares with their signs, less
        chance. ``jaccard``: of the features with the largest magnitudes, less chance. ``reason``: why a NaN (see
        ``legend``). ``("attr", key)`` [batch, target, *feature] and ``inputs``, a fingerprint, for the next tick. Of
        layers ``("spearman", path)`` and so on.

    Source: less chance as in Hubert and Arabie 1985 (J. Classification 2); the chance level of absolute maps: Adebayo
    et al. 2018, arXiv:1810.03292.
    """

    top: int = 10

    looks_back: ClassVar[bool] = True
    writes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("spearman", "cosine", "jaccard", "reason"), "batch target"),
        "attr": "batch target *feature",
        "inputs": "",
    }
    shown: ClassVar[tuple[str, ...] | None] = ("spearman", "cosine", "jaccard")
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "reason": {
            _COMPARED: "compared",
            _NOTHING_BEFORE: "there is nothing to compare with: no tick before, or not on this batch",
            _NO_RANKING: "all shares are of one size, now or before",
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        counted(self, top=self.top)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The attribution's own, since its shares are kept."""
        return self.of.labels(seen, model)

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Shares have the dimensions that the attribution gives them."""
        return self.of.dims(key, ndim) if key[0] == "attr" else super().dims(key, ndim)

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Compare the shares of all inputs together, or of each layer."""
        shares, inputs = self.shares(seen, model), inputs_hash(seen, model)
        before = self._before(seen, model, shares, inputs)
        found = TensorDict({"inputs": inputs})
        for first, sites in self.places(shares):
            then = None if before is None else in_one(before, sites)
            found.update(self.finished(_compared(in_one(shares, sites), then, self.top), first))
        for site, value in shares.items():
            found["attr", *path_of(site)] = value if self.of._many else value[:, 0]
        return found

    def _before(self, seen: Seen, model: HookedModel, shares: Point, inputs: Tensor) -> Point | None:
        """Return the shares at the tick before; None where that was not on this batch."""
        row = row_before(seen, model)
        if row is None or "inputs" not in row or int(row["inputs"]) != int(inputs):
            return None
        found: Point = {}
        for site, now in shares.items():
            then = row.get(("attr", *path_of(site)), None)
            then = then if then is None or self.of._many else then[:, None]
            if then is None or then.shape != now.shape:
                return None
            found[site] = then.to(now)
        return found


def _compared(now: Tensor, then: Tensor | None, top: int) -> Found:
    """Compare ``[row, target, feature]``, row by row and target by target."""
    if then is None:
        nan = torch.full(now.shape[:2], torch.nan, dtype=now.dtype, device=now.device)
        reason = torch.full_like(nan, _NOTHING_BEFORE, dtype=torch.int8)
        return {"spearman": nan, "cosine": nan.clone(), "jaccard": nan.clone(), "reason": reason}
    reason = torch.where(varied(now) & varied(then), _COMPARED, _NO_RANKING).to(torch.int8)
    return {
        "spearman": spearman(now, then),
        "cosine": cosine(now, then) - cosine_by_chance(now, then),
        "jaccard": jaccard(now, then, min(top, now.shape[-1])),
        "reason": reason,
    }
