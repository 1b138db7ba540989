"""What of an output's rise above a baseline's goes through each unit of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tdhook_train.errors import SettingsError
from tdhook_train.explain import Attribution, Compared, Found, Point, Problem
from tdhook_train.explain.here import gradients_in_place
from tdhook_train.explain.integrated import Integrated, summed
from tdhook_train.hooks import Selection
from tdhook_train.keys import path_of
from tdhook_train.method import Seen

__all__ = ["Conductance"]


@dataclass(frozen=True)
class Conductance(Integrated, Compared):
    """How much of what an output rises by, from a baseline input to the input, goes through each unit of a layer.

    The input goes in a straight line, units as it moves them: ``∫ ∂F/∂y · dy`` over the path. All layers are measured
    at once: over the path, a pass that carries derivatives forward, one without, and a pass back for each target.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``side``, ``reduction`` and
            ``max_bytes``.
        layers: paths, patterns, module classes or predicates; every layer by default.
        baseline: of the inputs, see :class:`Compared`, as is ``references``.
        points: see :class:`Integrated`, as are ``quadrature`` and ``rows_per_pass``.

    Writes:
        ``("attr", path)`` [batch, target, *feature] for each layer, in units of the target.
        ``("delta", path)`` [batch, target]: sum of the attributions less ``F(x) - F(baseline)``: the error of the
        quadrature where everything goes through the layer, else less what goes past it.

    Source: Dhamdhere et al. 2018, arXiv:1805.12233.
    """

    layers: Selection | None = "**"

    moves: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature", "delta": "batch target"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            raise SettingsError("Conductance needs layers, got None; of inputs, it is IntegratedGradients")

    def posed(self, whole: Problem, point: Point, every: Point, seen: Seen, index: Tensor) -> Problem:
        """Add the baseline of the inputs."""
        inputs = self._moving(seen, whole.model)
        moved = {key: value[index] for key, value in inputs.items()}
        path = super().posed(replace(whole, place="model"), moved, inputs, seen, index)
        units = Attribution.posed(self, whole, point, every, seen, index)
        return replace(units, still=whole.still | moved, baseline=path.baseline)

    def explain(self, problem: Problem) -> Found:
        """Integrate gradient times speed of every unit over the path of the inputs."""
        inputs = {key: problem.still[key] for key in problem.baseline}
        way = {key: end - problem.baseline[key] for key, end in inputs.items()}
        attr = self.integral(problem, problem.baseline, inputs, partial(_flows, problem, way))
        lower, upper = (replace(problem, place="model").values(ends) for ends in (problem.baseline, inputs))
        found: Found = {("attr", *path_of(site)): value for site, value in attr.items()}
        return found | {("delta", str(site)): summed({site: v}) - (upper - lower) for site, v in attr.items()}


def _flows(problem: Problem, way: Point, inputs: Point, index: Tensor, weight: Tensor) -> Iterator[Point]:
    """Yield gradient times speed of every unit, ``[n, *feature]`` times the weight, for one target after another."""
    at = problem.rows(index)
    at = replace(at, still=at.still | inputs)
    speeds = _speeds(at, inputs, {key: step[index] for key, step in way.items()})
    slopes = gradients_in_place(at)
    for target in range(len(problem.names)):
        yield {
            site: slopes[site][:, target] * speed * weight.to(speed.dtype).view(-1, *[1] * (speed.ndim - 1))
            for site, speed in speeds.items()
        }


def _speeds(problem: Problem, inputs: Point, way: Point) -> Point:
    """Return how fast every unit moves where the inputs move along their way: ``[n, *feature]`` at each site."""
    speeds: Point = {}

    def noted(site: str, value: Tensor) -> Tensor:
        if site not in speeds:  # of several calls the first, as for gradients
            speed = forward_ad.unpack_dual(value).tangent
            speeds[site] = torch.zeros_like(value) if speed is None else speed.clone()  # what is next may write to it
        return value

    with torch.inference_mode(False), torch.no_grad(), forward_ad.dual_level():
        going = {key: forward_ad.make_dual(value.clone(), way[key]) for key, value in inputs.items()}
        taps = {str(site): partial(noted, str(site)) for site in problem.sites}
        with problem.model.bent(taps, side=problem.place):  # type: ignore[arg-type]
            replace(problem, place="model")(going)
    return speeds
