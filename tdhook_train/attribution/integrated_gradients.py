"""What each input feature contributes to an output, along the straight path from a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.attribution.attribution import Attribution
from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of
from tdhook_train.method import Seen
from tdhook_train.ops.quadrature import gauss_legendre

__all__ = ["IntegratedGradients"]

_LEAST_ROWS, _MOST_ROWS = 32, 2048
_IN_CACHE = 2**20  # numbers


@dataclass(frozen=True)
class IntegratedGradients(Attribution):
    """How much each input feature contributes to an output, compared with a baseline.

    The contributions of all features sum to ``F(x) - F(baseline)`` up to the error of the quadrature, which is
    reported as ``delta``. All targets come from one forward pass over the path; each costs a backward pass.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets`` and ``rows``.
        points: Gauss-Legendre points of the path.
        baseline: where ``("baseline", key)`` is not in the batch: zeros, or the mean over the batch.
        rows_per_pass: at most so many points of paths go through the network at once, which bounds memory; by default
            as many as keep the largest activation in a core's cache, which was measured fastest.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, in units of the target.
        ``delta`` [batch, target]: sum of the attributions less ``F(x) - F(baseline)``.

    Source: Sundararajan et al. 2017, arXiv:1703.01365.
    """

    points: int = 50
    baseline: Literal["zero", "mean"] = "zero"
    rows_per_pass: int | None = None

    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature", "delta": "batch target"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("points", "rows_per_pass"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise SettingsError(f"IntegratedGradients needs {name} of 1 or more, got {given}")
        if self.baseline not in ("zero", "mean"):
            raise SettingsError(f"baseline={self.baseline!r} is none of 'zero', 'mean'")

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Integrate the gradients of every target over the path."""
        inputs, index = self._moving(seen, model), self._index(seen, model)
        still = {key: value[index] for key, value in self._beside(seen, model).items()}
        ends = {key: value[index] for key, value in inputs.items()} | still
        starts = {key: self._baseline(seen, key, inputs[key], index) for key in inputs} | still
        chunks = torch.arange(len(index), device=index.device).split(self._at_once(model))
        return torch.cat([self._explain(model, _rows(starts, chunk), _rows(ends, chunk)) for chunk in chunks])

    def _at_once(self, model: HookedModel) -> int:
        if self.rows_per_pass is not None:
            return self.rows_per_pass
        largest = max((site.size for site in model.traced), default=1)
        return min(_MOST_ROWS, max(_LEAST_ROWS, _IN_CACHE // max(largest, 1)))

    def _explain(self, model: HookedModel, starts: _Point, ends: _Point) -> TensorDict:
        attr = self._integrate(model, starts, ends)
        total = sum(value.flatten(2).sum(2) if value.ndim > 2 else value for value in attr.values())
        rows = len(next(iter(ends.values())))
        out = TensorDict({("attr", *path_of(key)): value for key, value in attr.items()}, batch_size=[rows])
        out["delta"] = total - self._rise(model, starts, ends)
        return out if self._many else out.apply(lambda value: value[:, 0])

    def _baseline(self, seen: Seen, key: NestedKey, value: Tensor, index: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value[index]  # a mask or an index does not move along the path
        given = seen.batch.get(("baseline", *path_of(key)), None)
        if given is not None:
            return given[index]
        if self.baseline == "mean":
            return value.mean(0, keepdim=True).expand_as(value[index])
        return torch.zeros_like(value[index])

    def _integrate(self, model: HookedModel, starts: _Point, ends: _Point) -> dict[NestedKey, Tensor]:
        rows = len(next(iter(ends.values())))
        at, weights = (x.to(model.device()) for x in gauss_legendre(self.points))
        moving = [key for key in model.in_keys if ends[key].is_floating_point()]
        sums: dict[tuple[int, NestedKey], Tensor] = {}
        targets = 0
        for chunk in torch.arange(self.points).split(max(1, self._at_once(model) // rows)):
            with torch.inference_mode(False), torch.enable_grad():
                repeated = {key: _repeat(end, len(chunk)) for key, end in ends.items() if key not in moving}
                path = repeated | {key: _between(starts[key], ends[key], at[chunk]) for key in moving}
                found = self._forward(model, path)
            targets = len(found)
            weight = weights[chunk].repeat_interleave(rows)
            for i, column in enumerate(found):
                for key, grad in zip(moving, _gradients(column, [path[k] for k in moving], weight), strict=True):
                    part = grad.unflatten(0, (len(chunk), rows)).sum(0)
                    sums[i, key] = sums[i, key] + part if (i, key) in sums else part
        return {k: torch.stack([sums[i, k] * (ends[k] - starts[k]) for i in range(targets)], 1) for k in moving}

    def _forward(self, model: HookedModel, point: _Point) -> list[Tensor]:
        batch = TensorDict(dict(point), batch_size=[len(next(iter(point.values())))])
        return list(self._explained(model(batch), batch, model).values())

    def _rise(self, model: HookedModel, starts: _Point, ends: _Point) -> Tensor:
        with torch.no_grad():
            low, high = (torch.stack(self._forward(model, point), 1) for point in (starts, ends))
        return high - low


_Point = dict[NestedKey, Tensor]


def _rows(point: _Point, index: Tensor) -> _Point:
    return {key: value[index] for key, value in point.items()}


def _repeat(value: Tensor, points: int) -> Tensor:
    """The same at every point of the path, ``[point * row, ...]``."""
    return value.repeat(points, *[1] * (value.ndim - 1))


def _between(start: Tensor, end: Tensor, at: Tensor) -> Tensor:
    """The points of the path, ``[point * row, ...]``."""
    t = at.to(end.dtype).view(-1, *[1] * end.ndim)
    return (start + t * (end - start)).flatten(0, 1).detach().requires_grad_()


def _gradients(column: Tensor, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Gradients of the weighted column, zero with respect to an input that it does not depend on."""
    if not column.requires_grad:
        return [torch.zeros_like(value) for value in inputs]
    grads = torch.autograd.grad(column, inputs, weight.to(column.dtype), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]
