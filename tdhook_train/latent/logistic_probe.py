"""How well a linear read-out of each layer tells classes apart, with what a score must be held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_train.errors import GroupsError, SettingsError
from tdhook_train.hooks import HookedModel
from tdhook_train.latent.class_blocks import class_labels, numbered
from tdhook_train.latent.fold_probes import FoldProbes
from tdhook_train.latent.layer_probe import LayerProbe
from tdhook_train.latent.logistic_scores import LogisticScores
from tdhook_train.method import Part, Parts, Seen
from tdhook_train.ops.classification import SCORES
from tdhook_train.ops.folds import circular_shifts
from tdhook_train.ops.join import Labels, Measured
from tdhook_train.ops.targets import columns, named
from tdhook_train.ops.units import padded

__all__ = ["LogisticProbe"]


@dataclass(frozen=True)
class LogisticProbe(LayerProbe):
    """How well a linear read-out of each layer tells the classes of each target apart, on trajectories held out.

    Logistic regression, softmax for more than two classes, fitted to convergence in float64 by Newton's method, all
    layers, folds and targets together; for quantities see :class:`RidgeProbe`. A score says nothing alone: beside it
    stand the same probe on the raw input, the same probe on the network at initialisation, and a null from circular
    shifts within trajectories.

    Costs no pass of its own (the shared one; another on the initial network, once a probe set). Fits cost more than
    ridge regression, and a shift is a fit of its own, if a rough one: about a tenth of the exact one for two classes,
    more for several. 27 layers of 32 units, 2,048 rows, two classes, one core: 0.13 s, and 0.01 s a shift; with three
    classes some five to ten times as much. Costs grow with the square of features × classes.

    Args:
        layers: paths, patterns, module classes or predicates; ``"**"`` is every leaf module, before and after
            activations alike.
        target: what is predicted, whole numbers or booleans: a key of the batch, a key with a feature index, a
            function of the batch (``lambda td: td["action"].argmax(-1)`` for a one-hot action), a list of these, or a
            mapping of names to these. Up to 64 classes each, found from the data. Multilabel: a boolean ``[rows, k]``
            is k targets of two classes, ``name.0`` and so on, each with a probe and a score of its own; their macro
            average is the mean over those targets.
        folds: number of folds; each trajectory lies in one. Fewer trajectories than folds: leave one out. Without
            trajectories rows count as independent.
        C: weight of the summed loss against ½‖w‖²; the intercept is not penalised. As in scikit-learn.
        shifts: circular shifts behind the null. 19 are the fewest that give a one-sided test at 5 % (the score must
            beat the best of 19), half as many as of the cheaper ridge probe; more give a steadier test.
        directions: also write what is read out, fitted to all rows (one fit more), for
            :func:`tdhook_train.metrics.direction_cosine`, steering, erasure, or to apply the probe elsewhere. As the
            rows of a run have one shape, give a target whose number of classes may change (the network's own choice,
            say) as a boolean a class.

    Writes:
        ``balanced_accuracy``, ``auc``, ``log_loss`` [layer, target]: of held-out rows, mean over folds. AUC is the
        mean over classes, each against the rest; log-loss is in nats, and less is better. For each score: ``_pooled``:
        of all held-out rows together. ``_observation``, ``_initial``: the baselines, NaN where their features are not
        finite, too many, or not known. ``_null``: what shifts reach (of log-loss, the least), ``_p``: share of shifts
        that score at least as well, itself counted. ``classes``: how many the target has. ``reason``,
        ``null_reason``: why a NaN (see ``legend``). Folds whose training rows lack a class, or which hold out one
        class only, are left out of the mean; ``reason`` says so where there are any. With ``directions``, ``direction``
        [layer, target, class, unit] and ``intercept`` [layer, target, class]: logits are ``x @ direction.mT +
        intercept``, and probabilities their softmax. Of two classes the first is 0 throughout, and the second is the
        normal of the boundary; of more they are 0 on average over classes. NaN beyond a target's classes or a layer's
        width, and where there is no score.

    Labels: beside ``target``, ``target_classes``: the classes of each target at the first tick.

    Raises:
        TargetError: a target is no whole number or boolean, or has more than 64 classes.
        GroupsError: fewer rows than folds.

    Source: Alain and Bengio 2016, arXiv:1610.01644; why a score needs a control: Hewitt and Liang 2019,
    arXiv:1909.03368.
    """

    C: float = 1.0
    shifts: int = 19
    directions: bool = False

    writes: ClassVar[Mapping[str, str]] = {
        **{
            score + kind: "layer target"
            for score in SCORES
            for kind in ("", "_pooled", "_observation", "_initial", "_null", "_p")
        },
        **dict.fromkeys(("classes", "reason", "null_reason"), "layer target"),
        "direction": "layer target class unit",
        "intercept": "layer target class",
    }
    shown: ClassVar[tuple[str, ...]] = tuple(
        score + kind for score in SCORES for kind in ("", "_pooled", "_observation", "_initial", "_null", "_p")
    )
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "reason": {
            0: "scored",
            1: "the target has one class",
            2: "no fold holds out two classes and leaves every class to train on",
            3: "there is one trajectory, so none can be held out",
            4: "the activations are not finite",
            5: "the layer gives more features, for so many classes, than can be solved",
            6: "the fit did not converge",
            7: "scored, without the folds that lack a class",
        },
        "null_reason": {
            0: "scored",
            1: "the score itself is NaN",
            2: "rows are not whole trajectories in time order",
            3: "no shifts were asked for",
            4: "the fits to shifted targets did not converge",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.C < float("inf"):
            raise SettingsError(f"LogisticProbe needs a positive weight of the loss, got C={self.C}")

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Layers, targets and the classes of each target."""
        return super().labels(seen, model) | {"target_classes": class_labels(self._targets(seen), "LogisticProbe")}

    def fold_probes(self, part: Part) -> FoldProbes:
        """Return the probe of each fold on one network; the scores are balanced accuracies."""
        blocks, folds, y, classes = self._data({"": part})
        found = LogisticScores(blocks, y, _counts(classes), folds, self.C).solve(None, keep="folds")
        values = padded([*(own.double() for own in classes), torch.full((2,), torch.nan, dtype=torch.float64)])[:-1]
        truth = values.gather(1, y.T).T
        nowhere = torch.full((len(y),), -1)
        return FoldProbes(
            found.mean[0],
            found.reason,
            nowhere if folds is None else folds,
            truth,
            found.weights,
            found.intercepts,
            values,
        )

    def _targets(self, seen: Seen) -> dict[str, Tensor]:
        return columns(seen.batch, named(self.target), len(seen.batch))

    def _data(self, parts: Parts) -> tuple[list[Tensor], Tensor | None, Tensor, list[Tensor]]:
        """Return the features of each layer, the folds (None for one trajectory), class numbers, and classes."""
        seen = next(iter(parts.values())).seen
        rows = len(seen.batch)
        if rows < self.folds:
            raise GroupsError(f"LogisticProbe needs a row for each of {self.folds} folds, got {rows} rows")
        blocks = self._blocks(parts, rows)
        groups = self._groups(seen, rows)
        y, classes = numbered(self._targets(seen), type(self).__name__)
        return blocks, self._folds(seen, rows) if (groups != groups[0]).any() else None, y, classes

    def _scores(self, parts: Parts) -> Measured:
        seen = next(iter(parts.values())).seen
        blocks, folds, y, of_targets = self._data(parts)
        classes, why_no_null = _counts(of_targets), self._no_null(seen, self.shifts)
        groups, shifts = self._groups(seen, len(y)), None
        if not why_no_null and folds is not None:
            shifts = circular_shifts(groups, self.shifts, seen.generator)
        found = LogisticScores(blocks, y, classes, folds, self.C)
        found.solve(shifts, keep="whole" if self.directions else "nothing")
        raw, initial = self._spread(
            self._remembered(parts, y, lambda given: LogisticScores(given, y, classes, folds, self.C).solve(None).mean),
            parts,
        )
        usable = ~torch.isin(found.reason, torch.tensor([1, 2, 3], dtype=torch.int8))  # of which it is the target
        null, p, null_reason = found.test(why_no_null)
        kinds = {
            "": found.mean,
            "_pooled": found.pooled,
            "_observation": torch.where(usable, raw, torch.nan),
            "_initial": torch.where(usable, initial, torch.nan),
            "_null": null,
            "_p": p,
        }
        values = {score + kind: value[i].clone() for i, score in enumerate(SCORES) for kind, value in kinds.items()}
        values |= {"classes": classes.expand(len(blocks), -1).clone()}
        values |= {"reason": found.reason, "null_reason": null_reason}
        if self.directions:
            values["direction"] = padded([own[:, 0].movedim(-1, 0) for own in found.weights]).movedim(1, -1)
            values["intercept"] = torch.stack([own[:, 0] for own in found.intercepts])
        return Measured(dict(values), {key: tuple(self.writes[key].split()) for key in values})


def _counts(classes: list[Tensor]) -> Tensor:
    return torch.tensor([len(own) for own in classes])
