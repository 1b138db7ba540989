"""Newton's method on many penalised logistic losses that share their features.

A gradient costs a fraction of a Hessian (of d features, 1/d), and the same features serve every fold, target and
shift; so a Hessian is kept for as long as its steps still shrink the error fast.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

__all__ = ["EXACT", "NEAR", "ROUGH", "START", "LogisticProblem", "factor_of", "solve"]

_CACHED = 1 << 18  # numbers worked on at a time: what stays in a core's cache
EXACT, NEAR, ROUGH, START = 3e-10, 1e-6, 3e-2, 0.3  # distances from the optimum, in the norm of the Hessian
_FAST = 0.3  # a step that shrinks the distance by less calls for a new Hessian
_STEPS = 100


@dataclass(frozen=True)
class LogisticProblem:
    """Penalised losses with common features, in the precision of ``x``.

    Args:
        x: features and a column of ones, ``[b, n, d]``.
        y: one-hot classes, ``[n, t, s, k]``; of two classes, the second alone.
        rows: which rows count, ``[n, f]``, 0 or 1.
        penalty: on the square of each coefficient, ``[b, d]``.
        fitted: which problems are to be solved, ``[f, t]``.
        pull: Σ y·x over the rows that count, ``[b, f, t, s, k, d]``: a part of the gradient that never changes.
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    penalty: Tensor
    fitted: Tensor
    pull: Tensor

    def some(self, blocks: Tensor) -> LogisticProblem:
        """Return the problems of some blocks."""
        return replace(self, x=self.x[blocks], penalty=self.penalty[blocks], pull=self.pull[blocks])

    def gradient(self, w: Tensor) -> Tensor:
        """Return the gradient at coefficients ``[b, f, t, s, k, d]``, in that shape."""
        (n, f), shape = self.rows.shape, w.shape
        columns = w[0, ..., 0].numel()
        flat = w.flatten(1, 4)  # [b, f·t·s·k, d]
        out = torch.empty_like(flat)
        for part in torch.arange(len(w)).split(max(1, _CACHED // (n * (columns + w.shape[-1])))):
            some = slice(int(part[0]), int(part[-1]) + 1)
            z = self.x[some] @ flat[some].mT
            p = _probabilities_(z.view(len(part), n, *shape[1:-1]))
            p.mul_(self.rows.view(n, f, 1, 1, 1))
            out[some] = p.flatten(2).mT @ self.x[some]
        return out.view(shape).sub_(self.pull).addcmul_(w, self.penalty[:, None, None, None, None])

    def hessian(self, w: Tensor) -> Tensor:
        """Return the Hessian at coefficients, one for all shifts, ``[b, f, t, k·d, k·d]``."""
        out = []
        for fold in range(self.rows.shape[1]):
            keep = self.rows[:, fold].nonzero()[:, 0]
            out.append(self._curvature(self.x[:, keep], w[:, fold]))
        return self.penalised(torch.stack(out, 1))

    def hessians_of_parts(self, w: Tensor, parts: Sequence[int]) -> Tensor:
        """Return what each part of the rows adds to the Hessian of all of them: ``[part, b, t, k·d, k·d]``."""
        return torch.stack([self._curvature(x, w[:, 0]) for x in self.x.split(list(parts), 1)])

    def _curvature(self, x: Tensor, w: Tensor) -> Tensor:
        b, t, _, k, d = w.shape
        z = (x @ w.flatten(1, 3).mT).view(*x.shape[:2], *w.shape[1:-1])
        p = _probabilities_(z)  # [b, n, t, s, k]
        if k == 1:
            curve = (p * (1 - p)).mean((-1, -2))  # [b, n, t]
            return torch.stack([(x * c[..., None]).mT @ x for c in curve.unbind(-1)], 1)
        p = p.mean(3)  # of all shifts one Hessian at their mean, which costs no more than that of one
        out = x.new_zeros(b, t, k * d, k * d)
        for i, j in itertools.product(range(b), range(t)):
            weighted = p[i, :, j, :, None] * x[i, :, None]  # [n, k, d]
            flat = weighted.flatten(1)
            own = weighted.permute(1, 2, 0) @ x[i]  # Σ pxxᵀ of each class, [k, d, d]
            out[i, j].addmm_(flat.T, flat, alpha=-1)
            out[i, j].view(k, d, k, d).diagonal(dim1=0, dim2=2).add_(own.permute(1, 2, 0))
        return out

    def penalised(self, curvature: Tensor) -> Tensor:
        """Add the penalty to curvatures ``[b, ..., k·d, k·d]``."""
        d = self.penalty.shape[1]
        k = curvature.shape[-1] // d
        penalty = self.penalty.repeat(1, k).view(len(self.penalty), *[1] * (curvature.ndim - 3), k * d)
        if k > 1:  # the sum of intercepts is free, and no gradient points along it: any curvature there will do
            last = torch.zeros(k * d, dtype=curvature.dtype, device=curvature.device)
            last[d - 1 :: d] = 1
            curvature = curvature + len(self.rows) * torch.outer(last, last) / k
        out = curvature + torch.diag_embed(penalty)
        out.diagonal(dim1=-2, dim2=-1).mul_(1 + 100 * torch.finfo(out.dtype).eps)  # collinear columns, rounded
        return out


def solve(problem: LogisticProblem, w: Tensor, factor: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Take Newton steps from ``w``.

    Returns:
        Coefficients, and their distance from the optimum by the last Hessian, ``[b, f, t, s]``.
    """
    newton = _Newton(problem, w, factor, tol)
    for _ in range(_STEPS):
        blocks = _having(newton.left)
        if 2 * len(blocks) <= len(w):  # the others are done
            if len(blocks):
                some = newton.w[blocks], newton.factor[blocks]
                newton.w[blocks], newton.distance[blocks] = solve(problem.some(blocks), *some, tol)
            break
        newton.advance()
    return newton.w, newton.distance


class _Newton:
    """Newton's method, with Hessians kept while they serve, and steps shortened where they lead away.

    Two steps by one Hessian are mixed as Anderson 1965 does, so that what they leave is least.
    """

    def __init__(self, problem: LogisticProblem, w: Tensor, factor: Tensor, tol: float) -> None:
        self.w, self.factor = w, factor
        self._problem, self._tol = problem, tol
        self._gradient = problem.gradient(w)
        self._step, self.distance = _newton(self._gradient, factor)
        self._mixed = torch.zeros_like(w)
        self._length = torch.ones_like(self.distance)
        self.left = problem.fitted[..., None].expand_as(self.distance) & ~(self.distance <= tol)

    def advance(self) -> None:
        """Take a step in every problem that is left, where it leads nearer."""
        move = (self._step + self._mixed) * (self._length * self.left)[..., None, None]
        gradient = self._problem.gradient(self.w + move)
        step, distance = _newton(gradient, self.factor)
        nearer = self.left & (distance < self.distance)
        slow = self.left & ~(distance < _FAST * self.distance)
        self.left &= nearer | ~(self.distance < 1e-2 * NEAR)  # what does not shrink any more is rounding
        self.left &= ~(nearer & (distance <= self._tol))
        pick = nearer[..., None, None]
        self._mixed = torch.where(pick, _mixed(move, step, self._step, gradient - self._gradient), 0.0)
        self.w = torch.where(pick, self.w + move, self.w)
        self._gradient, self._step = torch.where(pick, gradient, self._gradient), torch.where(pick, step, self._step)
        self.distance = torch.where(nearer, distance, self.distance)
        self._length = torch.where(nearer, 1.0, self._length / 4)
        if len(blocks := _having(slow & self.left)):
            self._renew(blocks)

    def _renew(self, blocks: Tensor) -> None:
        """Compute the Hessians of some blocks anew."""
        self.factor[blocks] = factor_of(self._problem.some(blocks).hessian(self.w[blocks]))
        self._step[blocks], distance = _newton(self._gradient[blocks], self.factor[blocks])
        self.distance[blocks] = torch.where(self.left[blocks], distance, self.distance[blocks])
        self._mixed[blocks] = 0


def _having(problems: Tensor) -> Tensor:
    """Return the numbers of the blocks that have any of the problems ``[b, f, t, s]``."""
    return problems.flatten(1).any(1).nonzero()[:, 0]


def _mixed(move: Tensor, step: Tensor, before: Tensor, bend: Tensor) -> Tensor:
    """Return what to add to the next step: the move just made, by the share that leaves least in the Hessian's norm.

    Args:
        move: the move just made.
        step: the step that would follow.
        before: the step that came before.
        bend: how much the gradient changed; minus the Hessian times the change of the steps.
    """
    turn = step - before
    share = (step * bend).sum((-1, -2)) / (turn * bend).sum((-1, -2))
    return -share.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)[..., None, None] * (move + turn)


def _newton(gradient: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Newton step, and how far it leads in the norm of the Hessian."""
    flat = gradient.flatten(-2)  # [b, f, t, s, k·d]
    step = -torch.cholesky_solve(flat.mT, factor).mT
    return step.view_as(gradient), (-flat * step).sum(-1).clamp(min=0).sqrt()


def factor_of(hessian: Tensor) -> Tensor:
    """Return the Cholesky factors; one that cannot be had leads nowhere, which calls for a new Hessian."""
    return torch.linalg.cholesky_ex(hessian)[0]


def _probabilities_(z: Tensor) -> Tensor:
    if z.shape[-1] == 1:
        return z.sigmoid_()
    # classes are few and lie side by side, where torch's own softmax is four times as slow
    z.sub_(reduce(torch.maximum, z.unbind(-1))[..., None]).exp_()
    return z.div_(reduce(torch.add, z.unbind(-1))[..., None])
