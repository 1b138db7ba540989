"""What of a row can be drawn as a line: for loggers and progress bars."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdhook_train.keys import dotted, path_of
from tdhook_train.ops.join import Measured

__all__ = ["scalars"]

_MOST = 16  # labels of a dimension that still make readable lines


def scalars(
    name: str, measured: Measured, *, networks: Collection[str] = (), shown: Collection[str] | None = None
) -> dict[str, float]:
    """Return means of floating-point keys, one a network and a label: ``probe/r2/actor_network/action``.

    Layers, units and features are averaged over; targets, thresholds and the like are told apart by their labels.
    Keys with a value for each row of the batch are left out, NaNs are not counted, and what is NaN alone is left out.

    Args:
        name: of the row.
        measured: the row.
        networks: whose layers are told apart; of one alone nothing is said.
        shown: the first names of the keys wanted; all, if None.
    """
    means: dict[str, float] = {}
    for key, value in measured.values.items():
        dims = measured.dims.get(key, ())
        own = [part for part in path_of(key) if part not in networks]
        if not value.is_floating_point() or "batch" in dims or (shown is not None and own[0] not in shown):
            continue
        for label, part in _parts(value.detach(), dims, measured.labels, networks):
            mean = float(torch.nanmean(part.double()))
            if mean == mean:
                means["/".join([name, dotted(key), *label])] = mean
    return means


def _parts(
    value: Tensor, dims: Sequence[str], labels: Mapping[str, Sequence[Any]], networks: Collection[str]
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the parts of a value that make a line each, and what they are called."""
    named = [(axis, _groups(dim, labels.get(dim, ()), networks)) for axis, dim in enumerate(dims)]
    split = [(axis, groups) for axis, groups in named if groups]
    for chosen in itertools.product(*(groups.items() for _, groups in split)):
        part = value
        for (axis, _), (_, index) in zip(split, chosen, strict=True):
            part = part.index_select(axis, torch.tensor(index, device=part.device))
        yield [label for label, _ in chosen], part


def _groups(dim: str, labels: Sequence[Any], networks: Collection[str]) -> dict[str, list[int]]:
    """Say which places along a dimension are told apart: those of each network's layers, else each by its label."""
    if dim == "layer":
        found = {
            network: [i for i, one in enumerate(labels) if str(one).startswith(f"{network}.")] for network in networks
        }
        return {network: index for network, index in found.items() if index} if len(networks) > 1 else {}
    if dim in ("unit", "feature", "episode") or not 0 < len(labels) <= _MOST:
        return {}
    return {str(label): [i] for i, label in enumerate(labels)}
