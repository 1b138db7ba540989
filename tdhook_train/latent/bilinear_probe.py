"""How much of a quantity a bilinear form of two layers recovers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tdhook_train.errors import GroupsError, PathError, SettingsError, did_you_mean
from tdhook_train.hooks import HookedModel
from tdhook_train.latent.folded_probe import Fits, FoldedProbe, Split, written
from tdhook_train.latent.folded_targets import FoldedTargets, was_scored
from tdhook_train.ops.bilinear import BilinearRidge, LowRankBilinear
from tdhook_train.ops.held_out import Predicted

__all__ = ["BilinearProbe"]

_MAX_SIZE = 4096  # of the matrix that is decomposed


@dataclass(frozen=True)
class BilinearProbe(FoldedProbe):
    """How much of each target a bilinear form of two layers recovers: cross-validated R² of ``hᵀ A g + b``.

    ``h`` is each layer's activation and ``g`` that of one other layer, or of the same: then the form reads products
    of its units, such as a squared distance or whether two things agree, which a linear probe of it cannot. A is
    fitted by ridge regression on all products of a unit of one and a unit of the other, exactly, in float64. A score
    says nothing alone: beside it stand the same probe on the raw input, paired with itself, the same on the network
    at initialisation, and a null from circular shifts within trajectories.

    Costs no pass of its own (the shared one; another on the initial network, once a probe set), and for each layer
    and fold an eigendecomposition as large as there are products or rows, whichever are fewer, for all targets,
    penalties and shifts together. A layer of 32 units, 2,048 rows, one core: 2 s, so name few layers. Of low rank,
    each target, penalty and shift is a fit of its own, of some dozen small solves.

    Args:
        layers: paths, patterns, module classes or predicates; ``"**"`` is every leaf module, before and after
            activations alike.
        target: what is predicted: a key of the batch, a key with a feature index (``("observation", 5)``), a function
            of the batch, a list of these, or a mapping of names to these.
        folds: number of folds; each trajectory lies in one. Fewer trajectories than folds: leave one out. Without
            trajectories rows count as independent.
        shifts: circular shifts behind the null; 39 give a one-sided test at 5 % (the null is the 38th of 39).
        right: path of the layer that gives ``g``; None for each layer itself.
        rank: of A, at most; None for whatever is best. Few are found from fewer rows, and say along which directions
            the two meet; the fit is then a local minimum, the one that is reached from the exact A.
        alphas: penalties; the score is the best over them, for the data and for every shift alike.

    Writes:
        ``r2`` [layer, target]: R², mean over folds, best penalty. ``r2_pooled``: R² of all held-out rows together, at
        that penalty. ``alpha``: the best penalty. ``r2_observation``, ``r2_initial``, ``r2_null``: the baselines and
        the null; a baseline is NaN where its features are not finite or not known. ``p``: share of shifts that score
        at least as much, itself counted. ``reason``, ``null_reason``: why a NaN (see ``legend``).

    Raises:
        PathError: ``right`` names no layer, or several.
        GroupsError: ``right`` gives another number of rows.

    Source: bilinear probes as in Poupart 2025, arXiv:2509.25475; low-rank forms as in Hewitt and Manning 2019
    (structural probes, N19-1419); why a score needs a control: Hewitt and Liang 2019, arXiv:1909.03368.
    """

    right: str | None = None
    rank: int | None = None
    alphas: tuple[float, ...] = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)

    writes: ClassVar[Mapping[str, str]] = {**written("r2"), "alpha": "layer target"}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alphas", tuple(float(alpha) for alpha in self.alphas))
        if not self.alphas or not all(0 < alpha < float("inf") for alpha in self.alphas):
            raise SettingsError(f"BilinearProbe needs positive penalties, got alphas={self.alphas}")
        if self.rank is not None and self.rank < 1:
            raise SettingsError(f"BilinearProbe needs a rank of 1 or more, or None, got rank={self.rank}")
        if self.right is not None and not isinstance(self.right, str):
            raise SettingsError(f"BilinearProbe needs the path of one layer, or None, got right={self.right!r}")

    def check(self, models: Mapping[str, HookedModel]) -> None:
        """Refuse, beside what every method refuses, a ``right`` that is no layer."""
        super().check(models)
        chosen = self.chosen(models)
        if self.right is not None and not any(model.has(self.right) for model in chosen.values()):
            known = [path for model in chosen.values() for path in model.modules]
            raise PathError(f"right={self.right!r} matches no module{did_you_mean(self.right, known)}")

    def concerns(self, model: HookedModel) -> bool:
        """Whether this network has both layers."""
        return super().concerns(model) and (self.right is None or model.has(self.right))

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers, and the one they are paired with."""
        return list(dict.fromkeys([*self.scored(model), *self._others(model)]))

    def _others(self, model: HookedModel) -> Sequence[str]:
        if self.right is None:
            return []
        found = model.sites(self.right)
        if len(found) != 1:
            raise PathError(f"BilinearProbe pairs layers with one other, and right={self.right!r} names {list(found)}")
        return found

    def _features(self, values: Mapping[str, Tensor], site: str, model: HookedModel) -> Tensor:
        left = super()._features(values, site, model)
        right = super()._features(values, (*self._others(model), site)[0], model)
        if len(left) != len(right):
            raise GroupsError(f"BilinearProbe: {site!r} gives {len(left)} rows, and {self.right!r} {len(right)}")
        return _paired(left, right)

    def _raw(self, features: Tensor) -> Tensor:
        return _paired(features, features)

    def _too_large(self, x: Tensor) -> bool:
        left, right = (len(side) for side in _kept(x))
        return min(len(x), left * right) > _MAX_SIZE

    def _names(self) -> tuple[str, ...]:
        return ("r2",)

    def _variants(self) -> int:
        return len(self.alphas)

    def _fit(self, x: Tensor, y: Tensor, split: Split) -> Callable[[Tensor], Predicted]:  # noqa: ARG002
        kept = _kept(x)
        pair = _unpaired(x, kept)
        exact = BilinearRidge(*pair, y, self.alphas)
        if self.rank is None or self.rank >= min(len(side) for side in kept):
            return lambda new: Predicted(exact(*_unpaired(new, kept)))
        wanted = [(t, alpha) for t in range(y.shape[1]) for alpha in self.alphas]
        fits = [LowRankBilinear(*pair, y[:, t], alpha, self.rank, exact.form(i)) for i, (t, alpha) in enumerate(wanted)]
        return lambda new: Predicted(torch.stack([fit(*_unpaired(new, kept)) for fit in fits], 1))

    def _beside(self, blocks: Sequence[Tensor], targets: FoldedTargets, found: Fits) -> dict[str, Tensor]:  # noqa: ARG002
        best = torch.tensor(self.alphas, dtype=torch.float64)[found.variant]
        return {"alpha": torch.where(was_scored(found.reason), best, torch.nan)}


def _paired(left: Tensor, right: Tensor) -> Tensor:
    """Lay two things side by side, ``[rows, 2, features]``, the narrower padded with zeros."""
    width = max(left.shape[1], right.shape[1])
    return torch.stack([functional.pad(one, (0, width - one.shape[1])) for one in (left, right)], 1)


def _kept(x: Tensor) -> list[Tensor]:
    """Return the features of each side that are not zero throughout, which no product would need; one at least."""
    some = [x[:, side].ne(0).any(0).nonzero()[:, 0] for side in (0, 1)]
    return [side if len(side) else side.new_zeros(1) for side in some]


def _unpaired(x: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return x[:, 0, kept[0]], x[:, 1, kept[1]]
