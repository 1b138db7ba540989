"""What each input feature contributes to an output's change from a baseline, activation by activation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from tdhook_train.errors import NetworkError
from tdhook_train.explain import Compared, Found, Point, Problem
from tdhook_train.explain.by_rule import Watched, functions_in
from tdhook_train.hooks.layout import ELEMENTWISE
from tdhook_train.hooks.reroute import Passed, Rule
from tdhook_train.keys import path_of

__all__ = ["DeepLift"]

_ACTIVATIONS = (*ELEMENTWISE, nn.PReLU, nn.Threshold, nn.Hardshrink, nn.Softshrink)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_NEAR = 1e-6  # below it a difference is rounding; the chord is then the tangent
_MISSED = 1e-3  # of the shares' sizes: a hundred times what float32 misses


@dataclass(frozen=True)
class DeepLift(Compared):
    """How much each input feature contributes to an output's difference from a baseline, by the rescale rule.

    Activations count as the chord between their values on the row and on the baseline, ``Δout / Δin``, max-pooling as
    what the winners of either have of the difference, everything else by its gradient on the row. All shares then sum
    to ``F(x) - F(baseline)``; several references are averaged over, which is also known as DeepLiftShap. One pass over
    rows and baselines together, and one back for each target.

    The rules hold at modules: an activation called as a function in the model's ``forward`` (``torch.tanh``), a product
    (attention) or a softmax breaks the sum. ``delta`` says by how much, and where that is more than rounding a warning
    says why. A softmax module is rescaled, and its mean over the classes taken off, as captum does: explain logits.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in units of the target.
        ``delta`` [batch, target]: sum of the attributions less ``F(x) - F(baseline)``; of layers ``("delta", path)``.

    Source: Shrikumar et al. 2017, arXiv:1704.02685; several references: Lundberg and Lee 2017, arXiv:1705.07874.
    """

    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature", "delta": "batch target"}

    def rows_at_once(self, problem: Problem) -> int:
        """Count the baseline of each row."""
        return max(1, super().rows_at_once(problem) // 2)

    def explain(self, problem: Problem) -> Found:
        """Differentiate rows and baselines together, by the rules."""
        rows, watched = len(problem), Watched(problem)
        index = torch.arange(rows, device=problem.device).repeat(2)
        weight = (torch.arange(2 * rows, device=problem.device) < rows).float()
        both = {site: torch.cat([value, problem.baseline[site]]) for site, value in problem.point.items()}
        each = list(watched.problem.gradients(both, index, weight, self._rules(problem)))
        attr: Point = {}
        for site, value in problem.point.items():
            grads = torch.stack([grad[site][:rows] for grad in each], 1)
            attr[site] = grads * (value - problem.baseline[site])[:, None]
        shares = torch.cat([value.reshape(*value.shape[:2], -1) for value in attr.values()], 2)
        there, before = torch.stack(list(watched.columns.values()), 1).detach().chunk(2)
        delta = shares.sum(2) - (there - before)
        self._say_what_is_missed(delta, shares, watched)
        return {("attr", *path_of(site)): value for site, value in attr.items()} | {"delta": delta}

    @staticmethod
    def _rules(problem: Problem) -> dict[nn.Module, Rule]:
        kinds = ((_ACTIVATIONS, _rescaled), (_POOLS, _pooled), ((nn.Softmax,), _softmax))
        parts = list(problem.model.module.modules())
        return {
            part: partial(_by_rows, rule, 2 * len(problem))
            for kind, rule in kinds
            for part in parts
            if isinstance(part, kind)
        }

    def _say_what_is_missed(self, delta: Tensor, shares: Tensor, watched: Watched) -> None:
        size = shares.abs().sum(2)
        missed = delta.abs() > _MISSED * (size + 1e-3)
        if not missed.any():
            return
        names = [name for name, bad in zip(watched.of.names, missed.any(0).tolist(), strict=True) if bad]
        called = ", ".join(functions_in(watched.columns.values())) or "none that is known"
        warnings.warn(
            f"DeepLift: the shares of {names} miss F(x) - F(baseline) by up to {float(delta.abs().max()):.3g} (see "
            f"'delta'). Its rules hold at modules; called as functions on the way, without a rule: {called}",
            stacklevel=2,
        )


def _by_rows(rule: Rule, rows: int, passed: Passed, gradient: Tensor) -> Tensor:
    """Go by a rule whose halves are rows and baselines.

    Raises:
        NetworkError: the first dimension does not have rows and baselines one after another.
    """
    if len(passed.output) % rows:
        raise NetworkError(
            f"DeepLift compares the rows with their baselines: {type(passed.module).__name__} gives out "
            f"{list(passed.output.shape)}, of {rows // 2} rows and as many baselines"
        )
    back = rule(passed, gradient)
    assert isinstance(back, Tensor)
    return back


def _rescaled(passed: Passed, gradient: Tensor) -> Tensor:
    """Eq. 12: m = Δout / Δin; where nothing changed, the derivative."""
    rise, run = _change(passed.output), _change(passed.inputs[0])
    near = run.abs() < _NEAR
    chord = gradient * rise / torch.where(near, 1, run)
    return torch.where(near, _tangent(passed, gradient), chord) if near.any() else chord


def _softmax(passed: Passed, gradient: Tensor) -> Tensor:
    """Sec. 3.5.2: m - mean(m) over the classes."""
    back = _rescaled(passed, gradient)
    dim = -1 if passed.module.dim is None else int(passed.module.dim)  # type: ignore[arg-type]
    return back - back.mean(dim, keepdim=True)


def _pooled(passed: Passed, gradient: Tensor) -> Tensor:
    """What a maximum gains goes to the row's winner, what it loses to the baseline's."""
    out, base = passed.output.chunk(2)
    most = torch.maximum(out, base)
    weight = gradient.chunk(2)[0]
    gained, lost = _tangent(passed, torch.cat([weight * (most - base), weight * (out - most)])).chunk(2)
    run = _change(passed.inputs[0])
    near = run.abs() < _NEAR
    back = (gained + lost).repeat(2, *[1] * (run.ndim - 1)) / torch.where(near, 1, run)
    return torch.where(near, _tangent(passed, gradient), back)


def _change(value: Tensor) -> Tensor:
    """The row's less the baseline's, for both alike."""
    value, base = value.chunk(2)
    return (value - base).repeat(2, *[1] * (value.ndim - 1))


def _tangent(passed: Passed, gradient: Tensor) -> Tensor:
    with torch.enable_grad():
        value = passed.inputs[0].clone().requires_grad_()
        (back,) = torch.autograd.grad(passed.again(value), value, gradient)
    return back
