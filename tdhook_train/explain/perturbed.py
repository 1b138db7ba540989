"""Attributions that put parts of the input in place of a baseline's, and see what becomes of the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_train.errors import SettingsError, did_you_mean
from tdhook_train.explain.compared import Compared
from tdhook_train.explain.problem import Found, Point, Problem
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import dotted, path_of, split_key
from tdhook_train.method import Seen
from tdhook_train.ops.join import Labels

__all__ = ["Perturbed", "coalition_values", "spread"]

_REST = "rest"


@dataclass(frozen=True)
class Perturbed(Compared):
    """An attribution that replaces groups of features by a baseline. No gradients: any model, integer inputs as well.

    Args:
        groups: features that are replaced together, by name: ``{"position": [0, 1], "speed": [2, 3]}`` by number of a
            feature (the last dimension) where there is one input, else ``("key", 0)`` or a whole ``"key"``. Features
            that no group names make a group of their own, ``"rest"``. By default each feature is a group.
        patch: side of the squares, in pixels, that an image is cut into, all channels together.

    An integer ``("groups", key)`` in the batch numbers the group of each feature, row by row (tokens of one word, say).
    """

    groups: Mapping[str, Sequence[Any]] | None = None
    patch: int | None = None

    discrete: ClassVar[bool] = True
    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature", "shares": "batch target group"}

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.patch is not None and self.patch < 1:
            raise SettingsError(f"{name} needs patch of 1 or more, got {self.patch}")
        if self.groups is not None and self.patch is not None:
            raise SettingsError(f"{name} takes groups or patch, not both")
        if self.groups is not None and not self.groups:
            raise SettingsError(f"{name} needs groups with names, got none")

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Add the names of the groups."""
        named = {} if self.groups is None else {"group": self._names(seen, model)}
        return {**super().labels(seen, model), **named}

    def posed(self, whole: Problem, point: Point, every: Point, seen: Seen, index: Tensor) -> Problem:
        """Add the group of each feature."""
        problem = super().posed(whole, point, every, seen, index)
        ids: Point = {}
        count = 0
        named = None if self.groups is None else _by_name(self.groups, problem)
        for site, value in point.items():
            given = seen.batch.get(("groups", *path_of(site)), None)
            if named is not None:
                ids[site] = named[site].expand_as(value)
            elif given is not None:
                ids[site] = given[index].long().view(*given.shape, *[1] * (value.ndim - given.ndim)).expand_as(value)
                ids[site] = ids[site] + count
            else:
                ids[site] = (_each(value, self.patch) + count).expand_as(value)
            count = max(count, int(ids[site].max()) + 1)
        return replace(problem, groups=ids, group_count=count)

    def versions(self, groups: int) -> int:  # noqa: ARG002
        """Say how many versions of each row are made for so many groups, where they are held at once."""
        return 1

    def rows_at_once(self, problem: Problem) -> int:
        """Count each version of a row."""
        return max(1, super().rows_at_once(problem) // max(1, self.versions(problem.group_count)))

    def shared(self, shares: Tensor, problem: Problem) -> Found:
        """Return what each group has, ``[row, target, group]``, as artifacts: for each feature, and by name."""
        found: Found = {("attr", *path_of(site)): value for site, value in spread(shares, problem).items()}
        return found if self.groups is None else found | {"shares": shares}

    def _names(self, seen: Seen, model: HookedModel) -> list[str]:
        assert self.groups is not None
        problem = next(iter(self.problems(seen, model)))
        return [*self.groups, *([_REST] if problem.group_count > len(self.groups) else [])]


def coalition_values(problem: Problem, kept: Tensor) -> Tensor:
    """Return the targets where only some groups keep their value: ``[row, version, target]``.

    Args:
        problem: with a baseline, which the other groups get.
        kept: ``[row, version, group]``, or ``[version, group]`` for all rows alike; a floating-point number between 0
            and 1 is the share of the value in a mixture with the baseline.
    """
    rows, versions = len(problem), kept.shape[-2]
    kept = kept.expand(rows, -1, -1)
    found = []
    for chunk in torch.arange(versions, device=problem.device).split(max(1, problem.at_once // rows)):
        now = kept[:, chunk]  # [row, version, group]
        point = {}
        for site, value in problem.point.items():
            ids = problem.groups[site].reshape(rows, -1)  # [row, feature]
            stays = now.gather(2, ids[:, None].expand(-1, len(chunk), -1)).view(rows, len(chunk), *value.shape[1:])
            point[site] = _mixed(value[:, None], problem.baseline[site][:, None], stays).flatten(0, 1)
        index = torch.arange(rows, device=problem.device).repeat_interleave(len(chunk))
        found.append(problem.values(point, index).unflatten(0, (rows, len(chunk))))
    return torch.cat(found, 1)


def spread(shares: Tensor, problem: Problem) -> Point:
    """Give each feature what its group has: ``[row, target, *feature]`` from ``[row, target, group]``."""
    found: Point = {}
    for site, ids in problem.groups.items():
        flat = ids.reshape(len(ids), 1, -1).expand(-1, shares.shape[1], -1)
        found[site] = (
            shares.gather(2, flat).unflatten(2, ids.shape[1:]) if ids.ndim > 1 else shares.gather(2, flat)[..., 0]
        )
    return found


def _mixed(value: Tensor, baseline: Tensor, stays: Tensor) -> Tensor:
    if stays.dtype == torch.bool:
        return torch.where(stays, value, baseline)
    return torch.lerp(baseline, value, stays.to(value.dtype))


def _each(value: Tensor, patch: int | None) -> Tensor:
    """Number the features of a row one by one, or by squares: ``[1, *feature]``."""
    if patch is None:
        return torch.arange(value[0].numel(), device=value.device).view(1, *value.shape[1:])
    if value.ndim < 3:
        raise SettingsError(f"patch={patch} cuts images; this input has {value.ndim - 1} dimension(s)")
    height, width = value.shape[-2:]
    across = -(-width // patch)
    down, right = (torch.arange(n, device=value.device) // patch for n in (height, width))
    return (down[:, None] * across + right).view(1, *[1] * (value.ndim - 3), height, width)


def _by_name(groups: Mapping[str, Sequence[Any]], problem: Problem) -> Point:
    """Number features by the groups that name them, the last number where none does: ``[1, *feature]``."""
    ids = {site: torch.full(value.shape[1:], len(groups), device=value.device) for site, value in problem.point.items()}
    for number, (name, members) in enumerate(groups.items()):
        for member in [members] if isinstance(members, str) else members:
            site, features = _place(name, member, problem)
            chosen: Any = (..., *features)
            where = ids[site][chosen]
            if (where != len(groups)).any():
                raise SettingsError(f"group {name!r}: {member!r} is in another group as well")
            ids[site][chosen] = number
    return {site: value[None] for site, value in ids.items()}


def _place(name: str, member: Any, problem: Problem) -> tuple[NestedKey, tuple[int, ...]]:
    sites = problem.sites
    if isinstance(member, int):
        if len(sites) > 1:
            raise SettingsError(f"group {name!r}: {member!r} may be of any of {sites}; write ('key', {member})")
        key: NestedKey = sites[0]
        features: tuple[int, ...] = (member,)
    else:
        key, features = split_key(member)
    if key not in sites:
        raise SettingsError(
            f"group {name!r}: {dotted(key)!r} is no input{did_you_mean(dotted(key), map(dotted, sites))}"
        )
    width = problem.point[key].shape[-1] if problem.point[key].ndim > 1 else 1
    if any(not -width <= feature < width for feature in features):
        raise SettingsError(f"group {name!r}: {dotted(key)!r} has features 0 to {width - 1}, not {features[-1]}")
    return key, features
