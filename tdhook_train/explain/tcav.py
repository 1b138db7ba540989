"""Whether an output rises with a concept, at each layer: TCAV scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from scipy.stats import t as student
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain.attribution import Attribution, one_of
from tdhook_train.explain.concept import CAVS, directions, labelled
from tdhook_train.explain.here import gradients_here
from tdhook_train.explain.problem import Found, Problem
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.keys import path_of
from tdhook_train.method import Method, Seen
from tdhook_train.ops.directions import over_positions
from tdhook_train.ops.join import Labels
from tdhook_train.ops.targets import named

__all__ = ["Tcav"]


@dataclass(frozen=True)
class Tcav(Attribution):
    """On what share of rows an output rises with a concept, at each layer, beside directions of no meaning.

    The direction of the concept (its CAV) is found from labelled rows, for each layer alone. Where labels are shuffled
    over the rows, it means nothing: the score stands beside those of such directions in a two-sided t test, of one
    value against the ``nulls`` others (so that a concept of shuffled labels is significant as often as it should be).
    Where an output is linear in a layer every score is 0 or 1, those of the nulls too, and the test can tell nothing:
    look at ``sensitivity`` there.

    One pass for all targets and layers, and one back for each target; and the directions, ``1 + nulls`` a layer.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows`` (over which the share is taken; all
            rows make the direction), ``layers`` (all by default) and ``max_bytes``.
        concept: which rows show the concept: a boolean key of the batch, one feature of a key, or a function of it.
        among: rows that the share is taken over, likewise (those of one class, say); all by default.
        cav: the difference of the means of activations averaged over positions, or the normal of a logistic regression.
        C: weight of the summed log-loss of the regression against ½‖w‖².
        nulls: how many directions of shuffled labels; 0 for no test.

    Writes:
        ``score`` [layer, target]: share of rows with a positive derivative along the direction.
        ``sensitivity`` [layer, target]: the mean of that derivative (summed over positions), by unit of the direction.
        ``null`` [layer, target, draw]: the scores of shuffled labels. ``p_value`` [layer, target].

    Source: Kim et al. 2018, arXiv:1711.11279; the test of one value, Crawford and Howell 1998.
    """

    layers: Selection | None = "**"
    concept: Any = None
    among: Any = None
    cav: Literal["mean-difference", "logistic"] = "mean-difference"
    C: float = 1.0
    nulls: int = 50

    moves: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {
        "score": "layer target",
        "sensitivity": "layer target",
        "p_value": "layer target",
        "null": "layer target draw",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, cav=CAVS)
        if self.layers is None or self.concept is None:
            raise SettingsError("Tcav needs layers, and a concept: which rows show it")
        if self.reduction != "none" or self.side != "output":
            raise SettingsError("Tcav needs reduction='none' and side='output': its scores are of what layers give out")
        if self.nulls < 0 or self.nulls == 1:
            raise SettingsError(f"Tcav needs nulls of 2 or more, or 0 for no test, got {self.nulls}")
        if not self.C > 0 or float("inf") == self.C:
            raise SettingsError(f"Tcav needs C above 0, got {self.C}")
        for which in (self.concept, self.among):
            if which is not None:
                named(which)

    def explain(self, problem: Problem) -> Found:
        """Differentiate every target at every layer, each position's gradient added up: ``[row, target, unit]``."""
        found: Found = {}
        for site, grad in gradients_here(problem).items():
            axis = problem.model.unit_axis(str(site), problem.point[site])
            last = grad.movedim(axis + 1, -1) if grad.ndim > 2 else grad[..., None]
            found["attr", *path_of(site)] = last.flatten(2, -2).sum(2) if last.ndim > 3 else last
        return found

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Find the directions of each layer, and take derivatives along them."""
        sites = list(self.taps(model))
        labels = labelled(seen.batch, self.concept, model.device())
        each = torch.stack([labels, *self._shuffled(labels, seen)], 1)
        slopes = replace(self, rows=None)._gradients(seen, model) if self.among is not None else None
        grads = slopes if slopes is not None else self._gradients(seen, model)
        kept = None if self.among is None else labelled(seen.batch, self.among, model.device())
        derivatives = []
        for site in sites:
            value = seen.values[site]
            cavs = directions(over_positions(value, model.unit_axis(site, value)), each, self.cav, self.C)
            grad = grads["attr", *path_of(site)].double()
            derivatives.append((grad if kept is None else grad[kept]) @ cavs.T)  # [row, target, labelling]
        along = torch.stack(derivatives)
        scores = (along > 0).double().mean(1)  # [layer, target, labelling]
        found = {"score": scores[..., 0], "sensitivity": along[..., 0].mean(1), "null": scores[..., 1:]}
        found["p_value"] = _p_value(found["score"], found["null"])
        return TensorDict(found if self._many else {key: value[:, 0] for key, value in found.items()}, batch_size=[])

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """One target alone has no dimension of its own."""
        names = Method.dims(self, key, ndim + (not self._many))
        return names if self._many else tuple(name for name in names if name != "target")

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Targets and layers."""
        known = super().labels(seen, model)
        return {name: known[name] for name in ("target",) if name in known} | Method.labels(self, seen, model)

    def _gradients(self, seen: Seen, model: HookedModel) -> Found:
        (problem,) = self.problems(seen, model)
        parts = [self.explain(chunk) for chunk in problem.chunks(self.rows_at_once(problem))]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _shuffled(self, labels: Tensor, seen: Seen) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0) if seen.generator is None else seen.generator
        orders = [torch.randperm(len(labels), generator=generator, device=generator.device) for _ in range(self.nulls)]
        return [labels[order.to(labels.device)] for order in orders]


def _p_value(score: Tensor, null: Tensor) -> Tensor:
    """Say how often one more null would lie as far from the others; NaN without any, or where all are the same."""
    n = null.shape[-1]
    if n < 2:
        return torch.full_like(score, torch.nan)
    spread = null.std(-1) * (1 + 1 / n) ** 0.5
    t = (score - null.mean(-1)).abs() / torch.where(spread > 0, spread, torch.nan)
    return torch.as_tensor(2 * student.sf(t.cpu().numpy(), n - 1)).to(score)
