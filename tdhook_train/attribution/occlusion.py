"""What an output loses where a window that slides over the input is covered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain import Compared, Found, Problem
from tdhook_train.keys import path_of

__all__ = ["Occlusion"]


@dataclass(frozen=True)
class Occlusion(Compared):
    """How much an output drops when a window of the input is replaced by a baseline, averaged over a feature's windows.

    Windows slide over one input after another; the last ones are cut off at its end. A pass for each window (of many
    rows at once), whatever the number of targets. No gradients: any model, integer inputs as well.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.
        window: a number for each dimension of a row's features (3 of an image); or one number: of pixels down and
            across an image, of steps in a sequence of features, of features where there is nothing else. The other
            dimensions are covered whole.
        stride: by how many the windows are apart, one number or one for each dimension; at most the window.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each input key, or layer, in units of the target.

    Source: Zeiler and Fergus 2013, arXiv:1311.2901.
    """

    window: int | tuple[int, ...] = 3
    stride: int | tuple[int, ...] = 1

    discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "stride"):
            given = getattr(self, name)
            if isinstance(given, list):
                object.__setattr__(self, name, tuple(given))
            sizes = (given,) if isinstance(given, int) else given
            if not sizes or any(size < 1 for size in sizes):
                raise SettingsError(f"Occlusion needs {name} of 1 or more, got {given!r}")

    def explain(self, problem: Problem) -> Found:
        """Cover one window of one site after another."""
        whole = problem.values(problem.point)
        return {("attr", *path_of(site)): self._site(problem, site, whole) for site in problem.sites}

    def _site(self, problem: Problem, site: NestedKey, whole: Tensor) -> Tensor:
        """Average what is lost over the windows that cover a feature: ``[row, target, *feature]``."""
        value, baseline = problem.point[site], problem.baseline[site]
        rows, features = len(problem), value.shape[1:]
        lost = torch.zeros(rows, whole.shape[1], features.numel(), dtype=whole.dtype, device=value.device)
        count = torch.zeros(features.numel(), dtype=whole.dtype, device=value.device)
        for covered in self._windows(features, max(1, problem.at_once // rows), problem.device):
            index = torch.arange(rows, device=problem.device).repeat_interleave(len(covered))
            point = {other: rest[index] for other, rest in problem.point.items() if other != site}
            point[site] = torch.where(covered, baseline[:, None], value[:, None]).flatten(0, 1)
            point = {each: point[each] for each in problem.sites}
            drop = whole[:, None] - problem.values(point, index).unflatten(0, (rows, len(covered)))
            inside = covered.view(len(covered), -1).to(whole.dtype)
            lost += drop.mT @ inside
            count += inside.sum(0)
        return (lost / count).view(rows, -1, *features)

    def _windows(self, features: torch.Size, at_once: int, device: torch.device) -> Iterator[Tensor]:
        """Yield which features each window covers, ``[window, *feature]``, some windows at a time."""
        along = [
            _along(size, window, stride, device)
            for size, window, stride in zip(features, *self._sizes(features), strict=True)
        ]
        places = torch.tensor(list(product(*(range(len(one)) for one in along))), dtype=torch.long, device=device)
        for chunk in places.split(at_once):
            covered = torch.ones(len(chunk), *[1] * len(features), dtype=torch.bool, device=device)
            for dim, one in enumerate(along):
                shape = [len(chunk), *[1] * len(features)]
                shape[1 + dim] = features[dim]
                covered = covered & one[chunk[:, dim]].view(shape)
            yield covered

    def _sizes(self, features: torch.Size) -> tuple[list[int], list[int]]:
        """Return window and stride in each dimension."""
        ndim = len(features)
        slid = {0: [], 1: [0], 2: [0]}.get(ndim, [ndim - 2, ndim - 1])
        windows, strides = list(features), list(features)
        for into, given in ((windows, self.window), (strides, self.stride)):
            if isinstance(given, int):
                for dim in slid:
                    into[dim] = min(given, features[dim])
            elif len(given) == ndim:
                into[:] = [min(one, size) for one, size in zip(given, features, strict=True)]
            else:
                raise SettingsError(f"Occlusion: {given} has {len(given)} number(s), rows have {ndim} dimension(s)")
        if any(stride > window for window, stride in zip(windows, strides, strict=True)):
            raise SettingsError(f"Occlusion needs stride of at most the window, got {self.stride!r} of {self.window!r}")
        return windows, strides


def _along(size: int, window: int, stride: int, device: torch.device) -> Tensor:
    """Which places of one dimension each window covers: ``[window, size]``."""
    count = -(-(size - window) // stride) + 1
    start = stride * torch.arange(count, device=device)[:, None]
    at = torch.arange(size, device=device)
    return (start <= at) & (at < start + window)
