"""Probes of each step applied to the activations of every other step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdhook_train.buffer.tables import package
from tdhook_train.errors import KeyMissingError
from tdhook_train.metrics.by_step import held_keys, rows_of
from tdhook_train.ops.fold_means import mean_balanced_accuracy, mean_r2

if TYPE_CHECKING:
    import xarray as xr

    from tdhook_train.buffer import Artifact

__all__ = ["probe_transfer"]

_ACTIVATION = "activation"


def probe_transfer(artifact: Artifact) -> xr.DataArray:
    """Score the probe of each step on the activations of each other step.

    A fold's probe, fitted at one step to the rows outside the fold, predicts the rows of the fold from what the layer
    gave out at the other step; the truth is the target as it was at that step. The score is the mean over folds: R² of
    ridge, balanced accuracy of logistic. On the diagonal it is what each step's own probe scores.

    Args:
        artifact: of a :class:`~tdhook_train.latent.ProbeTransfer`.

    Returns:
        ``[layer, target, fitted, applied]``: at which step the probe was fitted, and to whose activations it is
        applied. NaN where a probe has no score, or activations or targets are not finite. Steps that were measured on
        different data are not compared: NaN.

    Raises:
        KeyMissingError: the artifact holds no probes and activations.
        SettingsError: it holds the rows of several runs.
        MissingPackageError: xarray is not installed.
    """
    package("xarray")  # or it is missed after the work
    keys = [key for key in artifact.schema.columns if _ACTIVATION in key[:-1]]
    if not keys or ("weight",) not in artifact.schema.columns:
        raise KeyMissingError(f"probe_transfer needs what ProbeTransfer keeps; {held_keys(artifact)}")
    weights, intercepts = rows_of(artifact, "weight"), rows_of(artifact, "intercept").values
    layers = [str(layer) for layer in artifact.coords["layer"]]
    found = torch.full((*weights.values.shape[1:3], len(weights.steps), len(weights.steps)), torch.nan).double()
    for key in keys:
        place = key.index(_ACTIVATION)
        layer = layers.index(".".join((*key[:place], *key[place + 1 :])))
        own = _Asked.of(artifact, key[:place])
        x = rows_of(artifact, key).values.double()
        w, b = weights.values[:, layer, own.place, ..., : x.shape[-1]], intercepts[:, layer, own.place]
        for i in range(len(w)):
            found[layer, own.place, i] = own.scores(w[i], b[i], x, i).T
    found = torch.where(weights.same, found, torch.nan)
    coords = {"layer": layers, "target": artifact.coords["target"], "fitted": weights.steps, "applied": weights.steps}
    return package("xarray").DataArray(found.numpy(), coords, ("layer", "target", "fitted", "applied"), name="score")


@dataclass(frozen=True)
class _Asked:
    """What one network was asked, step by step."""

    truth: Tensor  # [step, n, target]
    folds: Tensor  # [step, n]
    classes: Tensor | None  # [step, target, class]
    place: list[int]  # of its targets, among those of all networks

    @classmethod
    def of(cls, artifact: Artifact, network: tuple[str, ...]) -> _Asked:
        key, classes = (*network, "truth"), (*network, "class_value")
        every = artifact.coords["target"]
        return cls(
            rows_of(artifact, key).values,
            rows_of(artifact, (*network, "row_fold")).values,
            rows_of(artifact, classes).values if classes in artifact.schema.columns else None,
            [every.index(one) for one in artifact.coords[artifact.dims(key)[1]]],
        )

    def scores(self, weights: Tensor, intercepts: Tensor, x: Tensor, fitted: int) -> Tensor:
        """Score the probes of one step, ``[target, fold, (class,) unit]``, on every other: ``[step, target]``."""
        folds = self.folds[fitted]
        said = torch.full((*x.shape[:2], *intercepts[:, 0].shape), torch.nan, dtype=torch.float64)
        for fold in folds[folds >= 0].unique().tolist():
            own = weights[:, fold].flatten(0, -2)  # targets, and classes within
            said[:, folds == fold] = (x[:, folds == fold] @ own.mT).unflatten(-1, said.shape[2:]) + intercepts[:, fold]
        if self.classes is None:
            each = [mean_r2(one, y, folds) for one, y in zip(said, self.truth, strict=True)]
        else:
            chosen = _chosen(said, self.classes[fitted])
            each = [mean_balanced_accuracy(one, y, folds) for one, y in zip(chosen, self.truth, strict=True)]
        usable = x.flatten(1).isfinite().all(1)[:, None] & self.truth.isfinite().all(1)
        return torch.where(usable, torch.stack(each), torch.nan)


def _chosen(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the class of the largest logit, ``[step, n, target]``; NaN where a logit is not finite."""
    there = ~classes.isnan()  # [target, class]
    best = torch.where(there, logits, -torch.inf).argmax(-1)
    found = classes.expand(*logits.shape).gather(-1, best[..., None])[..., 0]
    return torch.where((logits.isfinite() | ~there).all(-1), found, torch.nan)
