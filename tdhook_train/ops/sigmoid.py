"""Least-squares sigmoids of many series at once: a grid of places and widths, then Levenberg and Marquardt's steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tdhook_train.ops.series import Array

__all__ = ["FEWEST", "Sigmoids", "fit_sigmoids"]

FEWEST = 6  # ticks: four parameters, and something left to tell the scatter
_STEPS = 200
_DAMPED = 1e12  # no step so short lowers the squares: they are at their least, up to rounding


@dataclass(frozen=True)
class Sigmoids:
    """``low + rise / (1 + exp(-(x - middle) / width))``, one a series.

    ``error`` is the standard error of ``middle``, of noise that may be autocorrelated; infinite where the data do not
    fix it. ``converged`` says whether the squares are at their least.
    """

    low: Array
    rise: Array
    middle: Array
    width: Array
    error: Array
    converged: NDArray[np.bool_]


def fit_sigmoids(x: Array, values: Array) -> Sigmoids:
    """Fit rising sigmoids.

    Args:
        x: places of the ticks, rising, six or more.
        values: ``[tick, series]``, finite.
    """
    shift = values.mean(0)
    scale = values.std(0)
    y = ((values - shift) / np.where(scale > 0, scale, 1.0)).T
    bounds = _Bounds(x)
    p, converged = _least(x, y, _best_of_grid(x, y, bounds), bounds)
    error = _error(x, y, p)
    low, rise = p[:, 0] * scale + shift, p[:, 1] * scale
    return Sigmoids(low, rise, p[:, 2], np.exp(p[:, 3]), error, converged)


class _Bounds:
    """Within which a fit is looked for: beyond it lies what these ticks cannot tell."""

    def __init__(self, x: Array) -> None:
        span = x[-1] - x[0]
        self.middle = (x[0] - span, x[-1] + span)
        self.width = (np.log(np.diff(x).min() / 8), np.log(2 * span))

    def clip(self, p: Array) -> Array:
        out = p.copy()
        out[:, 2] = out[:, 2].clip(*self.middle)
        out[:, 3] = out[:, 3].clip(*self.width)
        return out


def _sigmoid(z: Array) -> Array:
    return 0.5 * (1 + np.tanh(z / 2))


def _best_of_grid(x: Array, y: Array, bounds: _Bounds) -> Array:
    """For each place and width the best level and rise in closed form: ``[series, 4]`` of the best that rises."""
    middles, widths = np.meshgrid(
        np.unique(np.concatenate([np.linspace(x[0], x[-1], 41), (x[1:] + x[:-1])[:: max(1, len(x) // 60)] / 2])),
        np.linspace(*bounds.width, 12),
        indexing="ij",
    )
    middle, width = middles.reshape(-1), widths.reshape(-1)
    phi = _sigmoid((x - middle[:, None]) / np.exp(width)[:, None])
    mean = phi.mean(1)
    centred = phi - mean[:, None]
    spread = (centred * centred).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rises = (y @ centred.T) / spread  # the mean of y is 0
        gain = np.where((rises > 0) & (spread > 1e-9), rises * rises * spread, 0.0)
    best = gain.argmax(1)
    rise = np.take_along_axis(rises, best[:, None], 1)[:, 0]
    rise = np.where(np.isfinite(rise) & (rise > 0), rise, 1.0)
    return np.stack([-rise * mean[best], rise, middle[best], width[best]], 1)


def _parts(x: Array, y: Array, p: Array) -> tuple[Array, Array]:
    """Residuals ``[series, tick]`` and their derivatives ``[series, tick, 4]``."""
    width = np.exp(p[:, 3:4])
    z = (x - p[:, 2:3]) / width
    phi = _sigmoid(z)
    slope = p[:, 1:2] * phi * (1 - phi)
    return y - p[:, :1] - p[:, 1:2] * phi, np.stack([np.ones_like(phi), phi, -slope / width, -slope * z], -1)


def _least(x: Array, y: Array, p: Array, bounds: _Bounds) -> tuple[Array, NDArray[np.bool_]]:
    """Lower the squares until no step does, each series with a damping of its own."""
    damping = np.full(len(p), 1e-3)
    done = np.zeros(len(p), dtype=bool)
    for _ in range(_STEPS):
        left = np.flatnonzero(~done)
        if not left.size:
            break
        e, jacobian = _parts(x, y[left], p[left])
        normal = np.einsum("sti,stj->sij", jacobian, jacobian)
        diagonal = np.einsum("sii->si", normal)
        held = damping[left, None] * np.maximum(diagonal, 1e-9) + 1e-12
        step = np.linalg.solve(normal + held[:, :, None] * np.eye(4), np.einsum("sti,st->si", jacobian, e)[..., None])
        tried = bounds.clip(p[left] + step[..., 0])
        before, after = (e * e).sum(1), (_parts(x, y[left], tried)[0] ** 2).sum(1)
        better = after <= before
        moved = np.abs(tried - p[left]).max(1)
        p[left[better]] = tried[better]
        damping[left] = np.where(better, np.maximum(damping[left] / 10, 1e-12), damping[left] * 10)
        still = (moved < 1e-8) | (before - after < 1e-8 * before)  # or on a floor, where a rise lies between two ticks
        done[left] = (better & still) | (damping[left] > _DAMPED)
    return p, done


def _error(x: Array, y: Array, p: Array) -> Array:
    """From the Jacobian, times how much more slowly autocorrelated noise averages out: ``(1 + ρ) / (1 - ρ)``."""
    e, jacobian = _parts(x, y, p)
    n = y.shape[1]
    squares = (e * e).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = (e[:, 1:] * e[:, :-1]).sum(1) / squares
        rho = np.clip(np.nan_to_num(rho + (1 + 4 * rho) / n), 0, 0.95)  # the bias of Kendall 1954
        noise = squares / (n - 4) * (1 + rho) / (1 - rho)
        _, values, vectors = np.linalg.svd(jacobian, full_matrices=False)
        known = values[:, -1] > 1e-10 * values[:, 0]
        variance = ((vectors[:, :, 2] / values) ** 2).sum(1)
        return np.where(known, np.sqrt(noise * variance), np.inf)
