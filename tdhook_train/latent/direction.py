"""What directions between two sides share: where the sides come from, folds, scores on rows held out, reasons."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import GroupsError, SettingsError
from tdhook_train.explain.concept import marked
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.method import Method, Seen, inputs_below, look
from tdhook_train.ops.directions import over_positions
from tdhook_train.ops.folds import fold_of
from tdhook_train.ops.join import Labels
from tdhook_train.ops.separation import Scores, held_out_scores
from tdhook_train.ops.targets import named
from tdhook_train.ops.units import by_row

__all__ = ["Direction", "Sides"]

_CONTRAST = ("positive", "negative")


@dataclass(frozen=True)
class Sides:
    """Rows on two sides.

    Args:
        x: of one layer, ``[row, unit]``, float64, the first row subtracted: in a layer that is constant all are 0.
        marks: which rows are on the positive side, ``[row, labelling]``: as labelled, then as a null has them.
        folds: fold of each row, ``[row]``; None where there is one trajectory.
    """

    x: Tensor
    marks: Tensor
    folds: Tensor | None


@dataclass(frozen=True)
class Direction(Method):
    """The direction along which the activations of a layer tell two sides apart.

    The sides are rows of the batch, told apart by a label; or, without one, two versions of each row's inputs, as
    :class:`ActivationAddition` takes them. Activations are averaged over positions. Scores are of rows held out, by
    trajectory: the direction they are measured along, and the midpoint between the sides on it, come from the others.
    The direction that is kept comes from all rows.

    Args:
        layers: paths, patterns, module classes or predicates.
        concept: which rows are on the positive side: a boolean key of the batch, one feature of a key, or a function
            of it. By default the sides are ``("positive", key)`` and ``("negative", key)`` for every input key.
        folds: number of folds; each trajectory lies in one, as do both versions of a row. Fewer trajectories than
            folds: leave one out. Without trajectories rows count as independent.

    Writes:
        ``("direction", layer)`` [unit]: of length 1, towards the positive side, float64.
        Of rows held out, those of all folds together, [layer]: ``separation``, the difference of the mean projections
        in standard deviations within the sides (Cohen's d); ``accuracy``, the share of rows on their side of the
        midpoint, mean over the sides (.5 is chance); ``auc``. ``reason``: why a NaN, or whether a search converged
        (see ``legend``).
    """

    layers: Selection = "**"
    concept: Any = None
    folds: int = 5

    by_trajectory: ClassVar[bool] = True
    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {
        "direction": "unit",
        "separation": "layer",
        "accuracy": "layer",
        "auc": "layer",
        "reason": "layer",
    }
    shown: ClassVar[tuple[str, ...] | None] = ("separation", "accuracy", "auc")
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "reason": {
            0: "found, and scored on rows held out",
            1: "one of the sides has no rows",
            2: "the activations are not finite",
            3: "the sides do not differ",
            4: "found; there is one trajectory, so no scores",
            5: "found; one side lies in a single fold, so no scores",
            6: "found and scored, but the search did not converge",
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 2:
            raise SettingsError(f"{type(self).__name__} needs at least 2 folds, got folds={self.folds}")
        if self.concept is None:  # an instance's own: with labels it runs on the batch as it is
            object.__setattr__(self, "reads", _CONTRAST)
        else:
            named(self.concept)

    @abstractmethod
    def found(self, x: Tensor, marks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Find a direction for each way of labelling the rows.

        Args:
            x: activations, ``[row, unit]``, float64 and finite.
            marks: which rows are on the positive side, ``[row, labelling]``; both sides have rows.
            generator: of what is drawn.

        Returns:
            Unit directions towards the positive side, ``[labelling, unit]``, 0 where the sides do not differ; and
            whether each search converged.
        """

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers; of a contrast nothing, since its sides are passes of their own."""
        return () if self.concept is None else model.sites(self.layers)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:  # noqa: ARG002 - the same for every batch
        """The layers."""
        sites = list(model.sites(self.layers))
        return {"layer": sites, "layer_type": [model.kind(site) for site in sites]}

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Units of layers of different widths are told apart by the layer's name."""
        names = super().dims(key, ndim)
        return tuple(f"{key[-1]}.{name}" if name == "unit" else name for name in names)

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Find the direction of every layer, and score those that leave rows out."""
        out: dict[NestedKey, Tensor] = {}
        scores, reasons = [], []
        for site, sides in self._sides(seen, model).items():
            direction, score, reason = self._of_layer(sides, seen)
            out["direction", site] = direction
            scores.append(score)
            reasons.append(reason)
        out |= {"reason": torch.tensor(reasons, dtype=torch.int8)}
        return TensorDict(out | self._written(scores, seen), batch_size=[])

    def _written(self, scores: Sequence[Scores], seen: Seen) -> dict[NestedKey, Tensor]:  # noqa: ARG002 - overridden
        """Return the artifacts made of the scores of all layers."""
        return {
            name: torch.stack([getattr(one, name)[0] for one in scores]) for name in ("separation", "accuracy", "auc")
        }

    def _labellings(self, marks: Tensor, seen: Seen) -> Tensor:  # noqa: ARG002 - a null overrides it
        """Lay beside the labels ``[row]`` what they are held against: ``[row, labelling]``."""
        return marks[:, None]

    def _of_layer(self, sides: Sides, seen: Seen) -> tuple[Tensor, Scores, int]:
        """Return the direction ``[unit]``, the scores by labelling, and the reason."""
        generator = torch.Generator().manual_seed(0) if seen.generator is None else seen.generator
        none = Scores.missing(sides.marks.shape[1])
        lost = sides.x.new_full(sides.x.shape[1:], torch.nan)
        truth = sides.marks[:, :1]
        if truth.all() or not truth.any():
            return lost, none, 1
        if not sides.x.isfinite().all():
            return lost, none, 2
        directions, converged = self.found(sides.x, truth, generator)
        if not directions.any():
            return lost, none, 3
        if sides.folds is None:
            return directions[0], none, 4
        scores = held_out_scores(sides.x, sides.marks, sides.folds, lambda x, marks: self.found(x, marks, generator)[0])
        unscored = bool(scores.accuracy[0].isnan())
        return directions[0], scores, 5 if unscored else 0 if converged.all() else 6

    def _sides(self, seen: Seen, model: HookedModel) -> dict[str, Sides]:
        sites = model.sites(self.layers)
        if self.concept is not None:
            values, rows = [seen.values], len(seen.batch)
            marks = marked(seen.batch, self.concept, model.device())
        else:
            if not seen.batch.batch_dims:
                name = type(self).__name__
                raise SettingsError(f"{name} needs rows of both sides, but the TensorDict has batch_size=[]")
            values = [look(model, inputs_below(seen.batch, side, model), sites)[0] for side in _CONTRAST]
            rows = seen.batch.numel()
            marks = (torch.arange(2 * rows) < rows).to(model.device())
        folds = self._folds(seen, rows)
        folds = None if folds is None else folds.repeat(len(values)).to(marks.device)
        labellings = self._labellings(marks, seen)
        out = {}
        for site in sites:
            x = torch.cat([self._rows(value[site], model, site, seen.batch) for value in values]).double()
            out[site] = Sides(x - x[0], labellings, folds)
        return out

    def _rows(self, value: Tensor, model: HookedModel, site: str, batch: TensorDictBase) -> Tensor:
        """Bring what a layer gave out for one side to ``[row, unit]``."""
        axes = model.unit_axis(site, value), model.row_axis(site)
        return over_positions(by_row(value, batch.batch_size, axes, f"{type(self).__name__}: {site!r}"), -1)

    def _folds(self, seen: Seen, rows: int) -> Tensor | None:
        groups = torch.arange(rows) if seen.groups is None else seen.groups.cpu()
        if len(groups) != rows:
            raise GroupsError(f"{type(self).__name__}: {len(groups)} trajectory ids for {rows} rows")
        return fold_of(groups, self.folds) if (groups != groups[0]).any() else None
