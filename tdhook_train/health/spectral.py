"""What the measures share that go by the singular values of a layer's activations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.method import Method, Seen
from tdhook_train.ops.spectrum import gram, singular_values
from tdhook_train.ops.units import as_rows, pooled

__all__ = ["Spectral", "keys_of"]


def keys_of(name: str) -> dict[str, str]:
    """Declare what a measure of this name writes."""
    return {name: "layer", f"{name}_centred": "layer", f"{name}_pooled": "", f"{name}_centred_pooled": ""}


@dataclass(frozen=True)
class Spectral(Method):
    """How many directions a layer's activations use, by a rule on the singular values of the matrix rows × units.

    The matrix as it is, and less its mean, which a large common offset does not hide. Costs no pass of its own. Of an
    image, channels are units and positions are rows. The singular values come from a Gram matrix in float64, which
    loses those below 3e-8 of the largest.

    Args:
        layers: paths, patterns, module classes or predicates.

    Writes, under the name of the measure:
        ``<name>``, ``<name>_centred`` [layer]: directions; 0 of a layer that is all zero, NaN of one that is not
        finite. ``<name>_pooled``, ``<name>_centred_pooled``: one number for the network, the sum of the ranks over the
        sum of the widths, which is the share of all directions that are used; layers that are not finite are left out.
    """

    layers: Selection = "**"

    looks_back: ClassVar[bool] = False

    name: ClassVar[str]
    """Of the measure: the first part of its keys."""

    @abstractmethod
    def rank(self, sigma: Tensor, rows: int) -> Tensor:
        """Count directions, from singular values ``[..., side]`` that fall; NaN where they are."""

    def taps(self, model: HookedModel) -> Sequence[str]:
        """The layers."""
        return model.sites(self.layers)

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Decompose every layer, layers of one shape together."""
        values = self.activations(seen, model)
        ranks = torch.empty(len(values), 2, dtype=torch.float64)
        for shape in {value.shape for value in values}:
            index = [i for i, value in enumerate(values) if value.shape == shape]
            grams = torch.stack([gram(values[i]) for i in index])  # [layer, raw or centred, side, side]
            ranks[index] = self.rank(singular_values(grams), shape[0]).cpu()
        widths = [value.shape[1] for value in values]
        shares = pooled([rank / width for rank, width in zip(ranks, widths, strict=True)], widths)
        found = zip(keys_of(self.name), (*ranks.unbind(1), *shares.unbind()), strict=True)
        return TensorDict(dict(found), batch_size=[])

    def activations(self, seen: Seen, model: HookedModel) -> list[Tensor]:
        """Return ``[rows, units]`` of every layer."""
        given = {site: seen.values[site] for site in self.taps(model)}
        return [as_rows(value, model.unit_axis(site, value)) for site, value in given.items()]
