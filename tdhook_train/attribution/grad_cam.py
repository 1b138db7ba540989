"""Where in an image an output looks: the maps of a convolution, weighted by what the output has of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tdhook_train.attribution.guided_backpropagation import guided
from tdhook_train.errors import NetworkError
from tdhook_train.explain import Attribution, Found, Point, Problem
from tdhook_train.explain.attribution import one_of
from tdhook_train.explain.by_rule import relu_gradients
from tdhook_train.explain.here import gradients_here
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of
from tdhook_train.method import Seen
from tdhook_train.ops.join import Labels

__all__ = ["GradCam"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BETWEEN = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class GradCam(Attribution):
    """Where an output looks: the maps of a layer, weighted by their mean gradients and summed, where that is positive.

    One forward and a backward pass a target for each layer; ``variant="guided"`` as many once more.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``side``, ``reduction`` and
            ``max_bytes``.
        layers: whose maps are weighted; by default the last convolution that ran.
        variant: the map alone; or, where the model reads one image, also guided backpropagation in the places that it
            shows.

    Writes:
        ``("attr", path)`` [batch, target, *place]: the map, as large as the layer's.
        ``("upsampled", path)`` [batch, target, *place]: as large as the image, where the model reads one.
        ``("guided", path)`` [batch, target, channel, *place]: times guided backpropagation, if asked for.

    Raises:
        NetworkError: no convolution ran and no layer is named; guided, but the model reads no image, or has no ReLU.

    Source: Selvaraju et al. 2017, arXiv:1610.02391.
    """

    variant: Literal["plain", "guided"] = "plain"

    writes: ClassVar[Mapping[str, str]] = {
        "attr": "batch target *place",
        "upsampled": "batch target *place",
        "guided": "batch target *feature",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, variant=("plain", "guided"))

    def taps(self, model: HookedModel) -> Sequence[str]:
        """Read the layer."""
        return super(GradCam, self._located(model)).taps(model)

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Explain by the layer."""
        return super(GradCam, self._located(model)).measure(seen, model)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Places have no names."""
        return super(GradCam, self._located(model)).labels(seen, model)

    def posed(self, whole: Problem, point: Point, every: Point, seen: Seen, index: Tensor) -> Problem:
        """Leave out masks: a map is of places, not of what is there."""
        return replace(super().posed(whole, point, every, seen, index), mask={})

    def explain(self, problem: Problem) -> Found:
        """Weight the maps."""
        (site,) = problem.sites
        axis = problem.model.unit_axis(str(site), problem.point[site])
        maps = problem.point[site].movedim(axis, 1)
        grads = gradients_here(problem)[site].movedim(axis + 1, 2)
        alpha = grads.flatten(3).mean(3) if grads.ndim > 3 else grads  # eq. 1
        found = torch.einsum("rtk,rk...->rt...", alpha, maps).relu()  # eq. 2
        out: Found = {("attr", *path_of(site)): found}
        image = _image(problem, maps.ndim)
        if image is not None and maps.ndim > 2:
            size = problem.still[image].shape[2:]
            out["upsampled"] = interpolate(found, size=size, mode=_BETWEEN[len(size)], align_corners=False)
        if self.variant == "guided":
            if "upsampled" not in out:
                raise NetworkError(
                    f"GradCam(variant='guided') needs one image that {problem.model.title} reads, in as many "
                    f"dimensions as {site!r}; it reads "
                    f"{ {key: list(problem.still[key].shape) for key in problem.model.in_keys} }"
                )
            assert image is not None
            out["guided"] = out["upsampled"][:, :, None] * self._guided(problem, image)
        return out

    def _guided(self, problem: Problem, image: NestedKey) -> Tensor:
        if not (value := problem.still[image]).is_floating_point():
            raise NetworkError(f"GradCam(variant='guided') needs a floating-point image; {image!r} is {value.dtype}")
        still = {key: other for key, other in problem.still.items() if key != image}
        at_input = replace(problem, place="model", point={image: value}, still=still)
        return relu_gradients("GradCam(variant='guided')", at_input, guided)[image]

    def _located(self, model: HookedModel) -> GradCam:
        if self.layers is not None:
            return self
        for row in reversed(model.traced):
            if isinstance(row.module, _CONVOLUTIONS):
                return replace(self, layers=str(row.site))
        kinds = Counter(type(row.module).__name__ for row in model.traced)
        there = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise NetworkError(f"GradCam needs layers=..., {model.title} ran no convolution: {there}")


def _image(problem: Problem, ndim: int) -> NestedKey | None:
    """Return the one input that has as many dimensions as the maps, if there is one."""
    read = [key for key in problem.model.in_keys if key in problem.still]
    found = [key for key in read if problem.still[key].ndim == ndim]
    return found[0] if len(found) == 1 else None
