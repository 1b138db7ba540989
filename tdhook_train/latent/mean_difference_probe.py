"""How well the means of the classes alone tell them apart in each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tdhook_train.latent.folded_probe import Fits, FoldedProbe, Split, written
from tdhook_train.latent.folded_targets import FoldedTargets, was_scored
from tdhook_train.ops.held_out import Predicted
from tdhook_train.ops.units import padded

__all__ = ["MeanDifferenceProbe"]


@dataclass(frozen=True)
class MeanDifferenceProbe(FoldedProbe):
    """How well each layer tells the classes of a target apart by the means of its activations alone.

    Two classes are told apart along the difference of their means, at the point halfway between them; of more, a row
    goes to the nearest mean. Nothing is searched for and nothing is inverted, so that it works where there are fewer
    rows than units, and the direction is the one to steer along; what :class:`LogisticProbe` finds beyond it lies in
    how the units vary together. A score says nothing alone: beside it stand the same probe on the raw input, the same
    probe on the network at initialisation, and a null from circular shifts within trajectories.

    Costs no pass of its own (the shared one; another on the initial network, once a probe set), and for each fold one
    product of the rows and the classes, all targets and all shifts together. 27 layers of 32 units, 2,048 rows, two
    classes, one core: 0.12 s, and 0.02 s a shift, most of it for the AUC.

    Args:
        layers: paths, patterns, module classes or predicates; ``"**"`` is every leaf module, before and after
            activations alike.
        target: what is predicted, whole numbers or booleans: a key of the batch, a key with a feature index, a
            function of the batch (``lambda td: td["reward"] > 0``), a list of these, or a mapping of names to these.
            Up to 64 classes each, found from the data.
        folds: number of folds; each trajectory lies in one. Fewer trajectories than folds: leave one out. Without
            trajectories rows count as independent.
        shifts: circular shifts behind the null. 19 are the fewest that give a one-sided test at 5 % (the score must
            beat the best of 19); more give a steadier test, and cost what ranking the rows for the AUC costs.
        directions: also write the differences, for :func:`tdhook_train.metrics.direction_cosine`, steering or erasure.

    Writes:
        ``balanced_accuracy``, ``auc`` [layer, target]: of held-out rows, mean over folds. AUC is the mean over
        classes, each against the rest, by how much nearer its mean is than the nearest other. For both: ``_pooled``:
        of all held-out rows together. ``_observation``, ``_initial``: the baselines, NaN where their features are not
        finite or not known. ``_null``: what shifts reach, ``_p``: share of shifts that score at least as well, itself
        counted. ``classes``: how many the target has. ``reason``, ``null_reason``: why a NaN (see ``legend``). With
        ``directions``, ``direction`` [layer, target, unit]: mean of the second class minus mean of the first over all
        rows, in units of the activations; NaN beyond the layer's width, and where there are not two classes.

    Labels: beside ``target``, ``target_classes``: the classes of each target.

    Raises:
        TargetError: a target is no whole number or boolean, or has more than 64 classes.

    Source: Marks and Tegmark 2023, arXiv:2310.06824 (mass-mean probing); why a score needs a control: Hewitt and Liang
    2019, arXiv:1909.03368.
    """

    shifts: int = 19
    directions: bool = False

    writes: ClassVar[Mapping[str, str]] = {
        **written("balanced_accuracy", "auc"),
        "direction": "layer target unit",
    }

    def _names(self) -> tuple[str, ...]:
        return ("balanced_accuracy", "auc")

    def _fit(self, x: Tensor, y: Tensor, split: Split) -> Callable[[Tensor], Predicted]:
        centre = x.mean(0)  # about it, since the squares below would cancel far from zero
        means = _means(x - centre, y, split.classes)  # [t, k, width]
        if split.classes == 2:
            difference = means[:, 1] - means[:, 0]
            halfway = (difference * (means[:, 1] + means[:, 0])).sum(-1) / 2

            def along(new: Tensor) -> Predicted:
                beyond = (new - centre) @ difference.mT - halfway
                return Predicted((beyond > 0).double(), beyond[..., None])

            return along

        def nearest(new: Tensor) -> Predicted:
            # ½‖x‖² - ½‖x - m‖² = x·m - ½‖m‖²
            near = torch.einsum("nd,tkd->ntk", new - centre, means) - means.square().sum(-1) / 2
            first, second = near.topk(2, -1).values.split(1, -1)
            return Predicted(near.argmax(-1).double(), near - torch.where(near == first, second, first))

        return nearest

    def _beside(self, blocks: Sequence[Tensor], targets: FoldedTargets, found: Fits) -> dict[str, Tensor]:
        values = super()._beside(blocks, targets, found)
        if not self.directions:
            return values
        two = was_scored(found.reason) & (values["classes"] == 2)
        differences = []
        for block, kept in zip(blocks, two, strict=True):
            means = _means(block.detach().double(), targets.y.clamp(max=1).to(block.device), 2)
            differences.append(torch.where(kept, (means[:, 1] - means[:, 0]).mT.cpu(), torch.nan))
        return values | {"direction": padded(differences).mT}


def _means(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """Return the mean of the rows of each class of each target: ``[t, k, width]``."""
    hot = functional.one_hot(y.long(), classes).to(x)  # [n, t, k]
    return torch.einsum("ntk,nd->tkd", hot, x) / hot.sum(0)[..., None]
