"""Putting the artifacts of several networks into one row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import SchemaError

__all__ = ["Labels", "Measured", "join", "merge", "overlaid"]

Labels = dict[str, list[Any]]
_PER_LAYER = ("layer", "layer_type")


@dataclass(frozen=True)
class Measured:
    """Artifacts, the names of their dimensions, and the labels along them."""

    values: dict[NestedKey, Tensor]
    dims: dict[NestedKey, tuple[str, ...]]
    labels: Labels = field(default_factory=dict)

    def tensordict(self) -> TensorDict:
        """The artifacts as one row."""
        row = TensorDict(batch_size=[])
        for key, value in self.values.items():
            row.set(key, value)
        return row


def merge(parts: Sequence[Measured]) -> Measured:
    """Put the artifacts of several methods side by side in one row.

    Raises:
        SchemaError: two methods wrote one key, or disagree about the labels of one dimension.
    """
    values: dict[NestedKey, Tensor] = {}
    dims: dict[NestedKey, tuple[str, ...]] = {}
    labels: Labels = {}
    for part in parts:
        for key in part.values:
            if key in values:
                raise SchemaError(f"two methods of one row write {key!r}; give them rows of their own")
        for dim, names in part.labels.items():
            if labels.setdefault(dim, names) != names:
                raise SchemaError(f"two methods of one row label dimension {dim!r} differently; give them two rows")
        values |= part.values
        dims |= part.dims
    return Measured(values, dims, labels)


def join(parts: Mapping[str, Measured]) -> Measured:
    """Join what one method measured on several networks.

    An artifact with a layer axis spans all networks, its layers labelled ``network.path``; along other dimensions
    the networks are aligned by label (by position where there are none), with NaN where a network has no value. Any
    other artifact nests under the network's name; where the networks label one of its dimensions differently, the
    dimension's name begins with the network's.
    """
    if set(parts) == {""}:
        return parts[""]
    labels = _union(parts)
    values: dict[NestedKey, Tensor] = {}
    dims: dict[NestedKey, tuple[str, ...]] = {}
    for name, part in parts.items():
        for key, value in part.values.items():
            names = part.dims[key]
            if "layer" in names:
                if key not in values:
                    values[key], dims[key] = _span(key, parts, labels), names
                continue
            own = {dim: part.labels[dim] for dim in names if part.labels.get(dim, labels.get(dim)) != labels.get(dim)}
            labels |= {f"{name}.{dim}": own_labels for dim, own_labels in own.items()}
            nested = (name, key) if isinstance(key, str) else (name, *key)
            values[nested] = value
            dims[nested] = tuple(f"{name}.{dim}" if dim in own else dim for dim in names)
    return Measured(values, dims, labels)


def _union(parts: Mapping[str, Measured]) -> Labels:
    labels: Labels = {}
    for name, part in parts.items():
        for dim, own in part.labels.items():
            if dim in _PER_LAYER:
                labels.setdefault(dim, []).extend(f"{name}.{label}" if dim == "layer" else label for label in own)
            else:
                known = labels.setdefault(dim, [])
                known += [label for label in own if label not in known]
    return labels


def _span(key: NestedKey, parts: Mapping[str, Measured], labels: Labels) -> Tensor:
    having = [part for part in parts.values() if key in part.values]
    names = having[0].dims[key]
    axis = names.index("layer")
    longest = [max(part.values[key].shape[i] for part in having) for i in range(len(names))]
    sizes = [len(labels[dim]) if dim in labels and dim != "layer" else n for dim, n in zip(names, longest, strict=True)]
    return torch.cat([_placed(part, key, sizes, labels) for part in having], axis)


def _placed(part: Measured, key: NestedKey, sizes: Sequence[int], labels: Labels) -> Tensor:
    value, names = part.values[key], part.dims[key]
    places: list[Tensor] = []
    for i, dim in enumerate(value.shape):
        if names[i] != "layer" and names[i] in part.labels:
            places.append(torch.tensor([labels[names[i]].index(label) for label in part.labels[names[i]]]))
        else:
            places.append(torch.arange(dim))
    shape = [value.shape[i] if names[i] == "layer" else size for i, size in enumerate(sizes)]
    out = value.new_full(shape, torch.nan if value.is_floating_point() else 0)
    out[torch.meshgrid(*places, indexing="ij")] = value
    return out


def overlaid(
    batch: TensorDictBase, outputs: Mapping[str, TensorDictBase], own: str, read: Collection[NestedKey]
) -> TensorDictBase:
    """Lay outputs over a copy of the batch: a network's own, and those that no other network gives.

    What some network reads stays as recorded, since methods run networks on this batch again; such an output stands
    below its network's name only.

    Args:
        batch: what the networks were run on.
        outputs: of each network.
        own: name of the network that the batch is for; empty where it is the only one.
        read: the keys that some network reads.
    """
    out = batch.copy()
    leaves = {name: dict(td.items(include_nested=True, leaves_only=True)) for name, td in outputs.items()}
    for name, given in leaves.items():
        for key, value in given.items():
            unique = not any(key in others for other, others in leaves.items() if other != name)
            if key not in read and (name == own or (unique and key not in leaves[own])):
                out.set(key, value)
    if own:
        for name, td in outputs.items():
            out.set(name, TensorDict(dict(td.items()), batch_size=out.batch_size))
    return out
