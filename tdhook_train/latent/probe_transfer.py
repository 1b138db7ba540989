"""The probes of every fold and the activations they are for, so that those of one step are applied to another's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain.of_another import OfAnother
from tdhook_train.hooks import HookedModel
from tdhook_train.latent.fold_probes import FoldProbes
from tdhook_train.latent.logistic_probe import LogisticProbe
from tdhook_train.latent.ridge_probe import RidgeProbe
from tdhook_train.method import Part, Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.units import evenly_spaced, padded

__all__ = ["ProbeTransfer"]


@dataclass(frozen=True)
class ProbeTransfer(OfAnother):
    """Whether a layer goes on saying a thing in the same way: the probe of one step, applied to the layer at another.

    Keeps of each step the probe of each fold, and what the layers gave out. Of these
    :func:`tdhook_train.metrics.probe_transfer` makes a matrix, step by step: every probe scored on the held-out rows of
    every other step. A probe that goes on scoring as well reads a code that stays; one that falls while each step's own
    probe scores well reads a code that moved. Measure it on a probe set: rows of different data are not compared.

    Costs no pass of its own; a fit a fold, and the activations on disk.

    Args:
        of: the probe, with its layers and targets: ``RidgeProbe(...)`` or ``LogisticProbe(...)``.
        rows: fit to and keep at most this many rows, spread evenly over the batch; None for all.

    Writes:
        ``("activation", layer)`` [batch, unit]: in single precision. ``weight`` [layer, target, fold, unit] and
        ``intercept`` [layer, target, fold]: of the probe that was fitted to the other folds; of classes with a
        dimension ``class`` behind ``fold``, as ``LogisticProbe(directions=True)`` has it. ``truth`` [batch, target]:
        what is predicted. ``row_fold`` [batch]: the fold that holds a row out, -1 where none does. ``score`` [layer,
        target]: of rows held out, mean over folds: R², or balanced accuracy. ``reason`` [layer, target]: why a NaN, by
        the probe's legend. Of classes, ``class_value`` [target, class]: the classes.

    Raises:
        GroupsError: one trajectory alone, for ridge; fewer rows than folds, for logistic.

    Source: linear probes, fitted anew at each step: Alain and Bengio 2016, arXiv:1610.01644.
    """

    of: RidgeProbe | LogisticProbe
    rows: int | None = 2048

    by_trajectory: ClassVar[bool] = True
    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {
        "activation": "batch unit",
        "weight": "layer target fold *class unit",
        "intercept": "layer target fold *class",
        "truth": "batch target",
        "row_fold": "batch",
        "class_value": "target class",
        "score": "layer target",
        "reason": "layer target",
    }
    shown: ClassVar[tuple[str, ...]] = ("score",)

    def __post_init__(self) -> None:
        if not isinstance(self.of, RidgeProbe | LogisticProbe):
            raise SettingsError(f"ProbeTransfer needs a probe, of=RidgeProbe() or LogisticProbe(); got of={self.of!r}")
        super().__post_init__()
        if self.rows is not None and self.rows < 1:
            raise SettingsError(f"ProbeTransfer needs rows of 1 or more, got {self.rows}")

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Layers, targets and rows."""
        own = self.of.labels(self._thinned(seen, model), model)
        kept = {dim: own[dim] for dim in ("layer", "layer_type", "target", "target_classes") if dim in own}
        return kept | {"batch": evenly_spaced(len(seen.batch), self.rows).tolist()}

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Units of layers of different widths are told apart by the layer's name."""
        names = super().dims(key, ndim)
        return ("batch", f"{key[-1]}.unit") if key[0] == "activation" else names

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Fit the probes, and keep them with what they were fitted to."""
        thin = self._thinned(seen, model)
        found = self.of.fold_probes(Part(thin, model))
        out: dict[NestedKey, Tensor] = {
            ("activation", site): self.of._block(Part(thin, model), site, len(thin.batch)) for site in self.taps(model)
        }
        out |= {"weight": _wide(found), "intercept": torch.stack(list(found.intercepts))}
        out |= {"truth": found.truth, "row_fold": found.folds, "score": found.score, "reason": found.reason}
        if found.classes is not None:
            out["class_value"] = found.classes
        return TensorDict(dict(out), batch_size=[])

    def _thinned(self, seen: Seen, model: HookedModel) -> Seen:
        """Return what was seen of some rows alone, in single precision."""
        rows = len(seen.batch)
        index, values = evenly_spaced(rows, self.rows), {}
        for site in self.taps(model):
            self.of._block(Part(seen, model), site, rows)  # refuses a layer that has not one row a sample
            value = seen.values[site]
            axis = model.row_axis(site) if value.ndim > 1 else 0
            values[site] = value.index_select(axis, index.to(value.device)).float()
        groups = None if seen.groups is None else seen.groups[index.to(seen.groups.device)]
        return replace(seen, batch=seen.batch[index.to(seen.batch.device or "cpu")], values=values, groups=groups)


def _wide(found: FoldProbes) -> Tensor:
    """Lay the weights of layers of different widths side by side: ``[layer, target, fold, (class,) unit]``."""
    return padded([weights.movedim(-1, 0) for weights in found.weights]).movedim(1, -1)
