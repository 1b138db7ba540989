"""What stands in for an activation, other than its value in one given state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

__all__ = ["substitutes"]


def substitutes(
    by: Literal["zero", "mean", "resample"],
    values: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    axes: Mapping[str, int],
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return what replaces the activations of some states, by site, ``[*shape]`` of ``before``.

    Args:
        by: 0, the mean over all states, or the value in another of the states, drawn: all sites of a state from one.
        values: activations of all states.
        before: those that are replaced.
        axes: along which dimension the states lie.
        generator: of the draw; one seeded with 0 by default.
    """
    if by == "zero":
        return {site: torch.zeros_like(value) for site, value in before.items()}
    if by == "mean":
        return {site: value.mean(axes[site], keepdim=True).expand_as(before[site]) for site, value in values.items()}
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    site, value = next(iter(before.items()))
    order = torch.randperm(value.shape[axes[site]], generator=generator, device=generator.device).cpu()
    drawn = torch.empty_like(order)
    drawn[order] = order.roll(1)  # nobody is drawn for itself
    return {site: value.index_select(axes[site], drawn.to(value.device)) for site, value in before.items()}
