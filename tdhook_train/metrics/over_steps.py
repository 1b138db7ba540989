"""Each step of a training compared with the others: representations, directions, attributions, decisions.

Functions of an artifact, as ``ArtifactBuffer.open(run)["name"]`` gives it. Of several rows of one step the last
counts. Steps that were measured on different data are not compared: NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tdhook_train.buffer.tables import package
from tdhook_train.errors import KeyMissingError, SettingsError
from tdhook_train.metrics.by_step import Key, held_keys, rows_of
from tdhook_train.ops.cka import Representations, thinned
from tdhook_train.ops.divergence import flips, kl
from tdhook_train.ops.likeness import by_size, cosine, jaccard

if TYPE_CHECKING:
    import xarray as xr

    from tdhook_train.buffer import Artifact

__all__ = ["attribution_stability", "churn", "direction_cosine", "layer_similarity"]

_ACTIVATION = "activation"


def layer_similarity(artifact: Artifact, *, rows: int = 2048) -> xr.DataArray:
    """Compare what each layer gave out at each step with what it gave out at each other step.

    Debiased centred kernel alignment of linear kernels, as of :class:`~tdhook_train.latent.Cka`; NaN for a layer whose
    values are constant, not finite, or have fewer than 4 rows. Of an image, channels and positions alike are units.

    Args:
        artifact: of an :class:`~tdhook_train.latent.ActivationCache`.
        rows: of each activation, spread evenly where there are more.

    Returns:
        ``[layer, step, other]``.

    Raises:
        KeyMissingError: the artifact holds no activations.
        SettingsError: it holds the rows of several runs.
        MissingPackageError: xarray is not installed.

    Source: Kornblith et al. 2019, arXiv:1905.00414; debiased: Nguyen et al. 2021, arXiv:2010.15327.
    """
    package("xarray")  # or it is missed after the work
    keys = [key for key in artifact.schema.columns if _ACTIVATION in key[:-1]]
    if not keys:
        raise KeyMissingError(
            f"layer_similarity needs activations, as ActivationCache keeps them; {held_keys(artifact)}"
        )
    found, labels = [], []
    for key in keys:
        read = rows_of(artifact, key)
        value = read.values.flatten(2) if read.values.ndim > 2 else read.values[..., None]
        kept = [thinned(one, rows) for one in value]
        similarity, _ = Representations(kept, [value.shape[1]] * len(kept)).among()
        found.append(torch.where(read.same, similarity, torch.nan))
        labels.append(".".join(part for part in key if part != _ACTIVATION))
    return _by_steps(torch.stack(found), ("layer",), {"layer": labels}, read.steps, "cka")


def direction_cosine(artifact: Artifact, key: Key = "direction") -> xr.DataArray:
    """Compare the directions of probes between steps: the cosine of the angle.

    Directions live in the coordinates of their layer: a layer that turns turns them, with nothing else changed.

    Args:
        artifact: of a ``RidgeProbe(directions=True)`` or ``LogisticProbe(directions=True)``, or of a direction between
            two sides.
        key: what holds the directions, along its last dimension; NaN beyond the width of a layer. Of two sides
            ``("direction", layer)``.

    Returns:
        ``[layer, target, step, other]``, of classes with a dimension ``class`` behind ``target``, of two sides
        ``[step, other]``; NaN where a direction is 0 (the first of two classes) or was not fitted.

    Raises:
        KeyMissingError: the artifact holds no directions.
        MissingPackageError: xarray is not installed.
    """
    package("xarray")
    read = rows_of(artifact, key)
    values = read.values.double().nan_to_num(0.0).movedim(0, -2)  # [..., step, unit]
    length = torch.linalg.vector_norm(values, dim=-1)
    units = values / torch.where(length > 0, length, torch.nan)[..., None]
    angles = torch.where(read.same, units @ units.mT, torch.nan)
    names = read.dims[:-1]
    labels = {dim: artifact.coords[own] for dim, own in zip(names, artifact.dims(key), strict=False)}
    return _by_steps(angles, names, labels, read.steps, "cosine")


def attribution_stability(artifact: Artifact, key: Key, *, top: int = 10) -> xr.Dataset:
    """Say how alike attributions are at neighbouring steps, for each sample, and average over samples.

    ``spearman``: rank correlation of the magnitudes. ``cosine``: of the attributions with their signs. ``jaccard``: of
    the ``top`` features of largest magnitude, less what as many features drawn at random would share on average. A
    sample whose attributions are all 0 or all of one size has no ranking, and is left out of that mean.

    Args:
        artifact: of an attribution method.
        key: of attributions, e.g. ``("attr", "observation")``; all dimensions but samples and targets are features.
        top: how many features; at most as many as there are, of which all have 0.

    Returns:
        ``[step, target]`` of each; a step is compared with the one before.

    Raises:
        MissingPackageError: xarray is not installed.
    """
    package("xarray")
    if top < 1:
        raise SettingsError(f"attribution_stability needs top of 1 or more, got {top}")
    read = rows_of(artifact, key)
    read.neighbours()
    outer = [i for i, dim in enumerate(read.dims, 1) if dim in ("batch", "target")]
    if not outer or read.dims[0] != "batch":
        raise SettingsError(f"{key!r} has dimensions {read.dims}, expected samples, targets and features")
    values = read.values.double().flatten(1 + len(outer))  # [step, batch, (target,) feature]
    top = min(top, values.shape[-1])
    ranks, now, before = by_size(values), values[1:], values[:-1]
    of_samples = {
        "spearman": cosine(ranks[1:], ranks[:-1]),
        "cosine": cosine(now, before),
        "jaccard": jaccard(now, before, top),
    }
    names = ("step", *(("target",) if len(outer) > 1 else ()))
    means = {name: _where(read.kept, value.nanmean(1)) for name, value in of_samples.items()}
    labels = {"target": artifact.coords[artifact.dims(key)[1]]} if len(outer) > 1 else {}
    return _dataset(means, names, {"step": read.steps[1:], **labels})


def churn(artifact: Artifact, key: Key, *, outputs: Literal["logits", "values"] = "logits") -> xr.Dataset:
    """Say how much the decisions on the same samples change from one step to the next.

    ``moved``: mean absolute change of the outputs. Of logits also ``changed``: share of samples whose largest one is
    another, and ``kl``: KL(before ‖ after) of the softmax, mean over samples, in nats.

    Args:
        artifact: of an :class:`~tdhook_train.latent.ActivationCache` of the last layer, say.
        key: what holds the outputs ``[batch, …, class]``, e.g. ``("activation", "head")``.
        outputs: whether the last dimension holds logits of classes (or actions), or values.

    Returns:
        ``[step]`` of each; a step is compared with the one before.

    Raises:
        MissingPackageError: xarray is not installed.

    Source: Schaul et al. 2022, arXiv:2206.00730, "The phenomenon of policy churn".
    """
    package("xarray")
    if outputs not in ("logits", "values"):
        raise SettingsError(f"outputs={outputs!r} is neither 'logits' nor 'values'")
    read = rows_of(artifact, key)
    read.neighbours()
    values = read.values.double()
    before, after = values[:-1], values[1:]
    found = {"moved": (after - before).abs().flatten(1).mean(1)}
    if outputs == "logits":
        found["changed"] = flips(before, after).flatten(1).mean(1)
        found["kl"] = kl(before, after).flatten(1).mean(1)
    found = {name: _where(read.kept, value) for name, value in found.items()}
    return _dataset(found, ("step",), {"step": read.steps[1:]})


def _where(kept: Tensor, value: Tensor) -> Tensor:
    return torch.where(kept.view(-1, *[1] * (value.ndim - 1)), value, torch.nan)


def _by_steps(value: Tensor, names: tuple[str, ...], labels: dict[str, Any], steps: list[int], name: str) -> Any:
    coords = {**labels, "step": steps, "other": steps}
    return package("xarray").DataArray(value.numpy(), coords, (*names, "step", "other"), name=name)


def _dataset(values: dict[str, Tensor], names: tuple[str, ...], coords: dict[str, Any]) -> Any:
    return package("xarray").Dataset({name: (names, value.numpy()) for name, value in values.items()}, coords)
