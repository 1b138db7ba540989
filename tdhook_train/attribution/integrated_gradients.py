"""What each input feature contributes to an output, along the straight path from a baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import KeyMissingError, SettingsError, TargetError
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of
from tdhook_train.method import Method, Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.quadrature import gauss_legendre
from tdhook_train.ops.targets import explained, named
from tdhook_train.ops.units import evenly_spaced

__all__ = ["IntegratedGradients"]

_ROWS_PER_PASS = 2048  # of path points: what stays in a core's cache for a small network, measured fastest


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """How much each input feature contributes to an output, compared with a baseline.

    The contributions of all features sum to ``F(x) - F(baseline)`` up to the error of the quadrature, which is
    reported as ``delta``. All targets come from one forward pass over the path; each costs a backward pass.

    Args:
        targets: what is explained: an output key, ``("output", 340)`` for one feature of it, a function of the
            outputs that gives one number a row, a list of these or a mapping of names to these (the artifact then has
            a target dimension after the batch). By default every feature of the first output.
        init_attr_targets: TDHook's form instead of ``targets``: a function of (outputs, inputs) that returns a
            TensorDict whose leaves are explained.
        points: Gauss-Legendre points of the path.
        rows: explain at most this many rows, spread evenly over the batch; all by default.
        baseline: where ``("baseline", key)`` is not in the batch: zeros, or the mean over the batch.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, in units of the target.
        ``delta`` [batch, target]: sum of the attributions less ``F(x) - F(baseline)``.

    Source: Sundararajan et al. 2017, arXiv:1703.01365.
    """

    targets: Any = None
    init_attr_targets: Callable[[TensorDictBase, TensorDictBase], TensorDictBase] | None = None
    points: int = 50
    rows: int | None = None
    baseline: Literal["zero", "mean"] = "zero"

    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature", "delta": "batch target"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets is not None and self.init_attr_targets is not None:
            raise SettingsError("IntegratedGradients takes targets or init_attr_targets, not both")
        if self.points < 1 or (self.rows is not None and self.rows < 1):
            raise SettingsError(
                f"IntegratedGradients needs points and rows of 1 or more, got {self.points}, {self.rows}"
            )
        if self.baseline not in ("zero", "mean"):
            raise SettingsError(f"baseline={self.baseline!r} is none of 'zero', 'mean'")
        if self.targets is not None:
            named(self.targets)

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """One target alone has no dimension of its own."""
        if self._many:
            return super().dims(key, ndim)
        return tuple(name for name in super().dims(key, ndim + 1) if name != "target")

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Targets, the rows of the batch, and the features of the input."""
        inputs = {key: value for key, value in self._inputs(seen, model).items() if value.is_floating_point()}
        index = evenly_spaced(len(seen.batch), self.rows)
        out: Labels = {} if self.rows is None else {"batch": index.tolist()}
        if self._many:
            out["target"] = list(self._explained(seen.batch, seen.batch, model))
        if len(inputs) == 1 and next(iter(inputs)) in seen.names:
            out["feature"] = list(seen.names[next(iter(inputs))])
        return out

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Integrate the gradients of every target over the path."""
        inputs = self._inputs(seen, model)
        index = evenly_spaced(len(seen.batch), self.rows).to(model.device())
        ends = {key: value[index] for key, value in inputs.items()}
        starts = {key: self._baseline(seen, key, inputs[key], index) for key in ends}
        attr = self._integrate(model, starts, ends)
        rise = self._rise(model, starts, ends)
        total = sum(value.flatten(2).sum(2) if value.ndim > 2 else value for value in attr.values())
        out = TensorDict({("attr", *path_of(key)): value for key, value in attr.items()}, batch_size=[len(index)])
        out["delta"] = total - rise
        return out if self._many else out.apply(lambda value: value[:, 0])

    @property
    def _many(self) -> bool:
        return self.init_attr_targets is None and (self.targets is None or isinstance(self.targets, list | Mapping))

    def _inputs(self, seen: Seen, model: HookedModel) -> dict[NestedKey, Tensor]:
        inputs = {key: seen.batch.get(key) for key in model.in_keys}
        if not any(value.is_floating_point() for value in inputs.values()):
            kinds = {key: value.dtype for key, value in inputs.items()}
            raise KeyMissingError(f"IntegratedGradients needs a floating-point input, the model reads {kinds}")
        return inputs

    def _baseline(self, seen: Seen, key: NestedKey, value: Tensor, index: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value[index]  # a mask or an index does not move along the path
        given = seen.batch.get(("baseline", *path_of(key)), None)
        if given is not None:
            return given[index]
        if self.baseline == "mean":
            return value.mean(0, keepdim=True).expand_as(value[index])
        return torch.zeros_like(value[index])

    def _explained(self, outputs: TensorDictBase, inputs: TensorDictBase, model: HookedModel) -> dict[str, Tensor]:
        rows = len(outputs)
        if self.init_attr_targets is not None:
            leaves = self.init_attr_targets(outputs, inputs).flatten_keys(".")
            return {"+".join(leaves.keys()): sum(leaf.reshape(rows, -1).sum(1) for leaf in leaves.values())}
        found = dict(explained(outputs, self.targets, model.out_keys, rows))
        if not self._many and len(found) != 1:
            raise TargetError(f"target {self.targets!r} has {len(found)} features; explain one, or give a list")
        return found

    def _integrate(self, model: HookedModel, starts: _Point, ends: _Point) -> dict[NestedKey, Tensor]:
        rows = len(next(iter(ends.values())))
        at, weights = (x.to(model.device()) for x in gauss_legendre(self.points))
        moving = [key for key, value in ends.items() if value.is_floating_point()]
        sums: dict[tuple[int, NestedKey], Tensor] = {}
        targets = 0
        for chunk in torch.arange(self.points).split(max(1, _ROWS_PER_PASS // rows)):
            with torch.inference_mode(False), torch.enable_grad():
                path = {key: _between(starts[key], ends[key], at[chunk]) for key in ends}
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
            both = self._forward(model, {key: torch.cat([starts[key], ends[key]]) for key in ends})
        low, high = torch.stack(both, 1).chunk(2)
        return high - low


_Point = dict[NestedKey, Tensor]


def _between(start: Tensor, end: Tensor, at: Tensor) -> Tensor:
    """The points of the path, ``[point * row, ...]``; what is no floating number is repeated."""
    if not end.is_floating_point():
        return end.repeat(len(at), *[1] * (end.ndim - 1))
    t = at.to(end.dtype).view(-1, *[1] * end.ndim)
    return (start + t * (end - start)).flatten(0, 1).detach().requires_grad_()


def _gradients(column: Tensor, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Gradients of the weighted column, zero with respect to an input that it does not depend on."""
    if not column.requires_grad:
        return [torch.zeros_like(value) for value in inputs]
    grads = torch.autograd.grad(column, inputs, weight.to(column.dtype), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]
