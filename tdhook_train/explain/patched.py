"""Attributions that blur an image around one place after another, and replace features of what is no image."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain.perturbed import Perturbed, coalition_values
from tdhook_train.explain.problem import Found, Point, Problem
from tdhook_train.keys import path_of
from tdhook_train.ops.blur import blurred

__all__ = ["Patched"]


@dataclass(frozen=True)
class Patched(Perturbed):
    """An attribution that compares outputs with those where something of the input is gone.

    An image is blurred around each place of a grid, all channels together. Of other inputs, features or groups of them
    are replaced by a baseline, as :class:`Perturbed` does.

    Args:
        spacing: of the grid, in pixels; between its places scores are interpolated.
        radius: standard deviation of the Gaussian patch within which the blurred image shows, in pixels.
        blur: standard deviation of the blur, in pixels.
    """

    spacing: int = 5
    radius: float = 5.0
    blur: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch is not None:
            raise SettingsError(f"{type(self).__name__} needs no patch: it blurs images around places, see spacing")
        for name, least in (("spacing", "of 1 or more"), ("radius", "above 0"), ("blur", "above 0")):
            given = getattr(self, name)
            if not given > 0:
                raise SettingsError(f"{type(self).__name__} needs {name} {least}, got {given}")

    @abstractmethod
    def score(self, before: Tensor, after: Tensor) -> Tensor:
        """Return what is lost with each part that is gone: ``[row, target, version]``.

        Args:
            before: the targets, ``[row, target]``, float64.
            after: those without one part after another, ``[row, version, target]``, float64.
        """

    def explain(self, problem: Problem) -> Found:
        """Blur places of images, and replace what is no image."""
        before = problem.values(problem.point).double()
        found: Found = {}
        images = {site: value for site, value in problem.point.items() if value.ndim > 3}
        for site, value in images.items():
            scores = self.score(before, self.patched_values(problem, site).double())
            found["attr", *path_of(site)] = self.filled(scores.to(value.dtype), value)
        flat = {site: value for site, value in problem.point.items() if site not in images}
        return found | self._of_groups(problem, flat, before) if flat else found

    def _of_groups(self, problem: Problem, flat: Point, before: Tensor) -> Found:
        """Replace groups of what is no image, while images stay as they are."""
        baseline, groups = ({site: part[site] for site in flat} for part in (problem.baseline, problem.groups))
        rest = {site: value for site, value in problem.point.items() if site not in flat}
        alone = replace(problem, point=flat, still=problem.still | rest, baseline=baseline, groups=groups)
        left_out = torch.cat([ids.flatten() for ids in groups.values()]).unique()
        kept = left_out[:, None] != torch.arange(problem.group_count, device=problem.device)
        after = coalition_values(alone, kept)
        scores = self.score(before, after.double()).to(after.dtype)
        shares = scores.new_zeros(*scores.shape[:2], problem.group_count)
        shares[..., left_out] = scores
        return self.shared(shares, alone)

    def patched_values(self, problem: Problem, site: NestedKey) -> Tensor:
        """Return the targets with the image blurred around each place: ``[row, place, target]``, row by row of places.

        Raises:
            SettingsError: the image is of integers.
        """
        value = problem.point[site]
        if not value.is_floating_point():
            raise SettingsError(f"{type(self).__name__} needs floating-point pixels, {site!r} is {value.dtype}")
        smooth = blurred(value, self.blur)
        if site in problem.mask:
            smooth = torch.where(problem.mask[site], smooth, value)
        down, across = (self._patches(size, value) for size in value.shape[-2:])
        rows, found = len(problem), []
        for chunk in torch.arange(len(down) * len(across), device=value.device).split(max(1, problem.at_once // rows)):
            patch = down[chunk // len(across)][:, :, None] * across[chunk % len(across)][:, None]
            patch = patch.view(len(chunk), *[1] * (value.ndim - 3), *patch.shape[1:])
            index = torch.arange(rows, device=value.device).repeat_interleave(len(chunk))
            # eq. 1: I (1 - M) + A(I) M
            moved = torch.lerp(value[:, None], smooth[:, None], patch).flatten(0, 1)
            point = {other: moved if other == site else rest[index] for other, rest in problem.point.items()}
            found.append(problem.values(point, index).unflatten(0, (rows, len(chunk))))
        return torch.cat(found, 1)

    def filled(self, scores: Tensor, value: Tensor) -> Tensor:
        """Interpolate scores between the places, for all channels: ``[row, target, *feature]``.

        Args:
            scores: ``[row, target, place]``.
            value: the image, ``[row, *feature]``.
        """
        down, across = (self._hats(size, value) for size in value.shape[-2:])
        grid = scores.unflatten(2, (down.shape[1], across.shape[1]))
        pixels = torch.einsum("yi,rtij,xj->rtyx", down.to(grid), grid, across.to(grid))
        between = value.ndim - 3
        return pixels.view(*pixels.shape[:2], *[1] * between, *pixels.shape[2:]).expand(-1, -1, *value.shape[1:])

    def _places(self, size: int, value: Tensor) -> Tensor:
        return torch.arange(0, size, self.spacing, dtype=value.dtype, device=value.device)

    def _patches(self, size: int, value: Tensor) -> Tensor:
        """Return the Gaussian about each place, along one dimension: ``[place, size]``."""
        at = torch.arange(size, dtype=value.dtype, device=value.device)
        return torch.exp(-0.5 * ((at - self._places(size, value)[:, None]) / self.radius) ** 2)

    def _hats(self, size: int, value: Tensor) -> Tensor:
        """Return the weight of places at pixels along one dimension: ``[size, place]``; beyond, the last place's."""
        places = self._places(size, value)
        at = torch.arange(size, dtype=value.dtype, device=value.device).clamp(max=float(places[-1]))
        return (1 - (at[:, None] - places).abs() / self.spacing).clamp(min=0)
