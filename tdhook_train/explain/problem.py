"""What is explained: some outputs, as functions of the values at some sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_train.hooks import HookedModel
from tdhook_train.hooks.reroute import Rule
from tdhook_train.ops.slopes import slopes

__all__ = ["Found", "Place", "Point", "Problem", "Rules"]

Point = dict[NestedKey, Tensor]
"""A value ``[row, *feature]`` for each site: inputs by key, what layers give out or take in by path."""

Found = dict[NestedKey, Tensor]
"""What a method found of some rows: ``[row, target, *feature]`` below ``("attr", site)``, and what else it gives."""

Rules = Mapping[nn.Module, Rule]

Place = Literal["model", "output", "input"]
"""Whether the sites are inputs of the model, or what layers give out or take in."""

_SAMPLE_BITS = 62


@dataclass(frozen=True)
class Problem:
    """The explained outputs of some rows, as a function of the values at some sites.

    Args:
        model: the network.
        read: the explained columns, ``[row]`` each by name, from outputs and what went in.
        names: of the targets.
        place: where the sites are.
        point: the values that are explained, ``[row, *feature]``. Several layers only where they are never moved.
        still: everything else that the network or the targets read, ``[row, ...]``.
        seeds: of each row, ``[row]``: what is drawn for a row goes by its own, whatever rows stand beside it.
        at_once: at most so many rows go through the network in one pass.
        baseline: what the values are compared with, if anything; the point itself where the mask is False.
        mask: what may be changed and has a share, ``[row, *feature]``; all of it by default.
        groups: number of the group that each feature belongs to, ``[row, *feature]``, where groups are moved.
        group_count: how many groups there are, of all rows, so that what is drawn does not go by how rows are cut.
    """

    model: HookedModel
    read: Callable[[TensorDictBase, TensorDictBase], dict[str, Tensor]]
    names: tuple[str, ...]
    place: Place
    point: Point
    still: Point
    seeds: Tensor
    at_once: int
    baseline: Point = field(default_factory=dict)
    mask: Point = field(default_factory=dict)
    groups: Point = field(default_factory=dict)
    group_count: int = 0

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def sites(self) -> list[NestedKey]:
        """Where the values stand."""
        return list(self.point)

    # ------------------------------------------------------------------ rows

    def rows(self, index: Tensor) -> Problem:
        """Return the problem of some of the rows, which may repeat."""
        parts: dict[str, Any] = {
            name: _rows(getattr(self, name), index) for name in ("point", "still", "baseline", "mask", "groups")
        }
        return replace(self, seeds=self.seeds[index.to(self.seeds.device)], **parts)

    def chunks(self, at_once: int) -> Iterator[Problem]:
        """Cut the rows into problems of at most so many."""
        if len(self) <= at_once:
            yield self
            return
        for index in torch.arange(len(self), device=self.device).split(max(1, at_once)):
            yield self.rows(index)

    @property
    def device(self) -> torch.device:
        """Where the values lie."""
        return next(iter(self.point.values())).device

    # ------------------------------------------------------------------ the function

    def __call__(self, point: Point, index: Tensor | None = None, rules: Rules | None = None) -> Tensor:
        """Return the targets ``[n, target]``, see :meth:`columns`."""
        return torch.stack(self.columns(point, index, rules), 1)

    def columns(self, point: Point, index: Tensor | None = None, rules: Rules | None = None) -> list[Tensor]:
        """Return the targets, ``[n]`` each, for n versions of the values; with a graph where gradients are on.

        Args:
            point: ``[n, *feature]`` at each site.
            index: which row each version is one of, ``[n]``; row i is version i by default.
            rules: the way back of some modules, see :meth:`HookedModel.bent`.
        """
        still = self.still if index is None else _rows(self.still, index)
        n = len(next(iter(point.values())))
        if self.place == "model":
            batch = TensorDict({**still, **point}, batch_size=[n])
            with self.model.bent(rules=rules) if rules else nullcontext():
                outputs = self.model.forward(batch)
        else:
            batch = TensorDict(still, batch_size=[n])
            values = {str(site): value for site, value in point.items()}
            with self.model.bent(values, side=self.place, rules=rules):
                outputs = self.model.forward(batch)
        return list(self.read(outputs, batch).values())

    def values(self, point: Point, index: Tensor | None = None) -> Tensor:
        """Return the targets ``[n, target]`` without a graph, in passes of at most :attr:`at_once` rows."""
        n = len(next(iter(point.values())))
        index = torch.arange(n, device=self.device) if index is None else index
        with torch.no_grad():
            parts = torch.arange(n, device=self.device).split(self.at_once)
            return torch.cat([self(_rows(point, part), index[part]) for part in parts])

    def rise(self) -> Tensor:
        """Return the targets ``[row, target]`` less those at the baseline."""
        both = {site: torch.cat([value, self.baseline[site]]) for site, value in self.point.items()}
        high, low = self.values(both, torch.arange(len(self), device=self.device).repeat(2)).chunk(2)
        return high - low

    def gradients(
        self,
        point: Point,
        index: Tensor | None = None,
        weight: Tensor | None = None,
        rules: Rules | None = None,
    ) -> Iterator[Point]:
        """Yield the gradient ``[n, *feature]`` at each site for one target after another: one pass forward for all.

        Args:
            point: ``[n, *feature]`` at each site, in one pass.
            index: which row each version is one of.
            weight: of each version, ``[n]``; 1 by default.
            rules: the way back of some modules.
        """
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {site: _leaf(value) for site, value in point.items()}
            found = self.columns(leaves, index, rules)
        yield from _gradients(found, leaves, weight)

    # ------------------------------------------------------------------ chance

    def drawn(self, draw: Callable[[torch.Generator], Tensor], stream: int = 0) -> Tensor:
        """Draw something for each row from a generator of its own: ``[row, ...]``, on the problem's device.

        Args:
            draw: from a generator.
            stream: a number for each of the things that one method draws, which are then independent.
        """
        generator = torch.Generator()
        seeds = (self.seeds + stream).tolist()
        return torch.stack([draw(generator.manual_seed(seed)) for seed in seeds]).to(self.device)


def seeds_of(generator: torch.Generator | None, rows: int) -> Tensor:
    """Draw a seed for each row; the same ones where no generator is given."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.randint(2**_SAMPLE_BITS, (rows,), generator=generator, device=generator.device).cpu()


def _rows(point: Point, index: Tensor) -> Point:
    return {key: value[index] for key, value in point.items()}


def _leaf(value: Tensor) -> Tensor:
    value = value.clone() if value.is_inference() else value.detach()
    return value.requires_grad_() if value.is_floating_point() else value


def _gradients(columns: list[Tensor], leaves: Point, weight: Tensor | None) -> Iterator[Point]:
    """Differentiate column by column; zeros where a column does not depend on a value."""
    moving = {site: leaf for site, leaf in leaves.items() if leaf.requires_grad}
    for i, column in enumerate(columns, 1):
        along = torch.ones_like(column) if weight is None else weight.to(column.dtype)
        found = slopes(column, list(moving.values()), along, keep=i < len(columns))
        yield dict(zip(moving, found, strict=True))
