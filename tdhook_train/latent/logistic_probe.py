"""How well a linear read-out of each layer tells classes apart, with what a score must be held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_train.errors import GroupsError, SettingsError, TargetError
from tdhook_train.hooks import HookedModel
from tdhook_train.latent.layer_probe import LayerProbe, null_place
from tdhook_train.method import Parts, Seen
from tdhook_train.ops.classification import SCORES, fold_scores, pooled_scores
from tdhook_train.ops.folds import circular_shifts
from tdhook_train.ops.join import Labels, Measured
from tdhook_train.ops.logistic import LogisticDesign
from tdhook_train.ops.targets import columns, named

__all__ = ["LogisticProbe"]

_MAX_CLASSES = 64
_MAX_COEFFICIENTS = 4096  # the Hessian of a fit takes their square
_NUMBERS = 1 << 24  # held at a time, as Hessians or as logits
_BIGGER_IS_BETTER = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)  # of SCORES


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
            mapping of names to these. Up to 64 classes each, found from the data.
        folds: number of folds; each trajectory lies in one. Fewer trajectories than folds: leave one out. Without
            trajectories rows count as independent.
        C: weight of the summed loss against ½‖w‖²; the intercept is not penalised. As in scikit-learn.
        shifts: circular shifts behind the null. 19 are the fewest that give a one-sided test at 5 % (the score must
            beat the best of 19), half as many as of the cheaper ridge probe; more give a steadier test.

    Writes:
        ``balanced_accuracy``, ``auc``, ``log_loss`` [layer, target]: of held-out rows, mean over folds. AUC is the
        mean over classes, each against the rest; log-loss is in nats, and less is better. For each score: ``_pooled``:
        of all held-out rows together. ``_observation``, ``_initial``: the baselines, NaN where their features are not
        finite, too many, or not known. ``_null``: what shifts reach (of log-loss, the least), ``_p``: share of shifts
        that score at least as well, itself counted. ``classes``: how many the target has. ``reason``,
        ``null_reason``: why a NaN (see ``legend``). Folds whose training rows lack a class, or which hold out one
        class only, are left out of the mean; ``reason`` says so where there are any.

    Labels: beside ``target``, ``target_classes``: the classes of each target at the first tick.

    Raises:
        TargetError: a target is no whole number or boolean, or has more than 64 classes.
        GroupsError: fewer rows than folds.

    Source: Alain and Bengio 2016, arXiv:1610.01644; why a score needs a control: Hewitt and Liang 2019,
    arXiv:1909.03368.
    """

    C: float = 1.0
    shifts: int = 19

    writes: ClassVar[Mapping[str, str]] = {
        **{
            score + kind: "layer target"
            for score in SCORES
            for kind in ("", "_pooled", "_observation", "_initial", "_null", "_p")
        },
        **dict.fromkeys(("classes", "reason", "null_reason"), "layer target"),
    }
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
        classes = [_classes(name, value) for name, value in self._targets(seen).items()]
        shown = [", ".join(map(str, own.tolist())) for own in classes]
        return super().labels(seen, model) | {"target_classes": shown}

    def _targets(self, seen: Seen) -> dict[str, Tensor]:
        return columns(seen.batch, named(self.target), len(seen.batch))

    def _scores(self, parts: Parts) -> Measured:
        seen = next(iter(parts.values())).seen
        rows = len(seen.batch)
        if rows < self.folds:
            raise GroupsError(f"LogisticProbe needs a row for each of {self.folds} folds, got {rows} rows")
        blocks = self._blocks(parts, rows)
        groups = self._groups(seen, rows)
        targets = self._targets(seen)
        classes = torch.tensor([len(_classes(name, value)) for name, value in targets.items()])
        y = torch.stack([value.cpu().unique(return_inverse=True)[1] for value in targets.values()], 1)
        folds = self._folds(seen, rows) if (groups != groups[0]).any() else None
        why_no_null = self._no_null(seen, self.shifts)
        shifts = None if why_no_null or folds is None else circular_shifts(groups, self.shifts, seen.generator)
        found = _Scores(blocks, y, classes, folds, self.C).solve(shifts)
        raw, initial = self._spread(self._baselines(parts, y, classes, folds), parts)
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
        return Measured(dict(values), {key: tuple(self.writes[key].split()) for key in values})

    def _baselines(self, parts: Parts, y: Tensor, classes: Tensor, folds: Tensor | None) -> Tensor:
        """Score the raw inputs and the initial networks, once for the same targets: ``[3, block, target]``."""
        memo = next(iter(parts.values())).seen.memo
        if "baselines" not in memo or not torch.equal(memo["baselines"][0], y):
            raw, initial = self._baseline_blocks(parts)
            memo["baselines"] = y, _Scores(raw + initial, y, classes, folds, self.C).solve(None).mean
        mean: Tensor = memo["baselines"][1]
        return mean


class _Scores:
    """Scores of many blocks on many targets: of like width and number of classes, solved in one batch.

    What cannot be solved is put out of the way; ``reason`` says why, by the probe's legend.
    """

    def __init__(self, blocks: Sequence[Tensor], y: Tensor, classes: Tensor, folds: Tensor | None, c: float) -> None:
        self._blocks, self._y, self._classes, self._folds, self._c = blocks, y, classes, folds, c
        shape = 3, len(blocks), y.shape[1]
        self.mean = torch.full(shape, torch.nan, dtype=torch.float64)
        self.pooled = self.mean.clone()
        self.shifted: Tensor | None = None  # [3, block, target, shift]
        self._lost = torch.zeros(shape[1:], dtype=torch.bool)  # shifts that did not converge
        finite = torch.stack([block.sum() for block in blocks]).isfinite().cpu()  # NaN and infinity survive a sum
        widths = torch.tensor([block.shape[1] for block in blocks])
        wide = (widths[:, None] + 1) * torch.where(classes > 2, classes, 1) > _MAX_COEFFICIENTS
        self.reason = torch.where(wide, 5, torch.where(finite, 0, 4)[:, None])
        self.reason[:, classes < 2] = 1
        if folds is None:
            self.reason[:] = 3
        self.reason = self.reason.to(torch.int8)

    def solve(self, shifts: Tensor | None) -> _Scores:
        """Fit and score the targets, and the targets shifted."""
        if shifts is not None:
            self.shifted = torch.full((*self.mean.shape, len(shifts)), torch.nan, dtype=torch.float64)
        for k in self._classes[self._classes > 1].unique().tolist():
            of_k = (self._classes == k).nonzero()[:, 0]
            for some in self._batches(of_k, k):
                self._solve(some, of_k, k, shifts)
        return self

    def test(self, why_not: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the null of each score, p and why they are NaN: ``[3, block, target]`` twice, ``[block, target]``."""
        missing = self.mean[0].isnan()
        if self.shifted is None:
            nan = torch.full_like(self.mean, torch.nan)
            return nan, nan, torch.where(missing & (why_not == 0), 1, why_not).to(torch.int8)
        sign = _BIGGER_IS_BETTER[:, None, None]
        shifted, own = self.shifted * sign[..., None], self.mean * sign
        count = shifted.shape[-1]
        null = shifted.sort(-1).values[..., null_place(count)] * sign
        p = (1 + (shifted >= own[..., None]).sum(-1)).double() / (count + 1)
        reason = torch.where(missing, 1, torch.where(self._lost, 4, 0)).to(torch.int8)
        kept = (reason == 0) & self.mean.isfinite()
        return torch.where(kept, null, torch.nan), torch.where(kept, p, torch.nan), reason

    def _batches(self, of_k: Tensor, k: int) -> Iterator[list[int]]:
        """Gather blocks of like width, as many as fit into memory."""
        alike: dict[int, list[int]] = {}
        for i in (self.reason[:, of_k] == 0).any(1).nonzero()[:, 0].tolist():
            alike.setdefault(max(64, 1 << (self._blocks[i].shape[1] - 1).bit_length()), []).append(i)
        for blocks in alike.values():
            width = 1 + max(self._blocks[i].shape[1] for i in blocks)
            at_once = max(1, _NUMBERS // (self._fold_count * ((k if k > 2 else 1) * width) ** 2))
            yield from (blocks[i : i + at_once] for i in range(0, len(blocks), at_once))

    @property
    def _fold_count(self) -> int:
        return 1 if self._folds is None else int(self._folds.max()) + 1

    def _solve(self, some: Sequence[int], of_k: Tensor, k: int, shifts: Tensor | None) -> None:
        if self._folds is None:  # then no block is left to solve
            return
        design = LogisticDesign([self._blocks[i] for i in some], self._folds, self._c)
        size = len(some) * len(self._y) * (k if k > 2 else 1) * (1 if shifts is None else len(shifts))
        for targets in of_k.split(max(1, _NUMBERS // size)):
            place = torch.tensor(some)[:, None], targets
            y = self._y[:, targets].to(self._blocks[0].device)
            fit = design.fit(y, k)
            held_out = fit.held_out, y[..., None], self._folds, fit.fitted
            mean, used = (value.cpu() for value in fold_scores(*held_out))
            pooled = pooled_scores(*held_out).cpu()
            failed = ~fit.converged.all(3).all(1).cpu()
            reason = torch.where(used.all(0), 0, torch.where(used.any(0), 7, 2)).expand_as(failed)
            reason = torch.where(failed, 6, reason).to(torch.int8)
            scored = torch.isin(reason, torch.tensor([0, 7], dtype=torch.int8))
            self.reason[place] = reason
            self.mean[:, place[0], place[1]] = torch.where(scored, mean[..., 0], torch.nan)
            self.pooled[:, place[0], place[1]] = torch.where(scored, pooled[..., 0], torch.nan)
            if shifts is not None and self.shifted is not None:
                fit = design.fit_shifted(y, k, shifts)
                turned = y[shifts.to(y.device)].permute(1, 2, 0)
                scores = fold_scores(fit.held_out, turned, self._folds, fit.fitted)[0].cpu()
                self.shifted[:, place[0], place[1]] = torch.where(scored[..., None], scores, torch.nan)
                self._lost[place] = ~fit.converged.all(3).all(1).cpu()


def _classes(name: str, target: Tensor) -> Tensor:
    """Return the classes of a target, in order.

    Raises:
        TargetError: they are no whole numbers or booleans, or too many.
    """
    if target.is_floating_point() or target.is_complex():
        raise TargetError(
            f"target {name!r} is {target.dtype}, and LogisticProbe tells classes apart: give whole numbers or "
            "booleans, or use RidgeProbe for quantities"
        )
    classes = target.unique()
    if len(classes) > _MAX_CLASSES:
        raise TargetError(
            f"target {name!r} has {len(classes)} classes, and LogisticProbe takes up to {_MAX_CLASSES}: group them, "
            "or use RidgeProbe on them as quantities"
        )
    return classes
