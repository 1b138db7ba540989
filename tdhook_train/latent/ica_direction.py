"""The independent component of a layer along which two sides lie farthest apart."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdhook_train.errors import MissingPackageError, SettingsError
from tdhook_train.latent.direction import Direction
from tdhook_train.ops.directions import unit
from tdhook_train.ops.separation import cohens_d

__all__ = ["IcaDirection"]


_TOL = 1e-8  # of 1 - cos between steps: 1e-4 radians, so that the start leaves no trace


@dataclass(frozen=True)
class IcaDirection(Direction):
    """Which independent component of a layer's activations tells two sides apart best.

    FastICA of scikit-learn takes the activations of both sides apart, without their labels, into components that
    share as little as possible; the component whose values lie farthest apart between the sides, in standard
    deviations within them (Cohen's d), is the direction, turned towards the positive side. It is the row of the
    unmixing matrix: projections on it are that component's values. Where activations are Gaussian their components are
    not defined, and the search may not converge. No pass of its own with labels, two without; ``folds + 1`` searches a
    layer.

    Args:
        layers: see :class:`Direction`, as are ``concept`` and ``folds``.
        components: in how many leading principal components to look; if None, in as many as the activations have, up
            to one for ten rows (more would each follow a row or two).
        max_steps: of the search.

    Writes:
        What :class:`Direction` does.

    Raises:
        MissingPackageError: scikit-learn is not installed.

    Source: Hyvärinen and Oja 2000, "Independent component analysis: algorithms and applications".
    """

    components: int | None = None
    max_steps: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.components is not None and self.components < 1:
            raise SettingsError(f"IcaDirection needs components of 1 or more, got {self.components}")
        if self.max_steps < 1:
            raise SettingsError(f"IcaDirection needs max_steps of 1 or more, got {self.max_steps}")
        _fast_ica()  # said now, not at the first tick

    def found(self, x: Tensor, marks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Take the activations apart, and choose for each labelling."""
        unmixing, converged = self._components(x, generator)  # [component, unit]
        directions = x.new_zeros(marks.shape[1], x.shape[1])
        if len(unmixing):
            values = x @ unmixing.T
            for i, mark in enumerate(marks.T):
                apart = cohens_d(values, mark[:, None]).nan_to_num(0.0)
                best = apart.abs().argmax()
                directions[i] = unit(unmixing[best]) * apart[best].sign()
        return directions, marks.new_full(marks.shape[1:], converged)

    def _components(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, bool]:
        centred = x - x.mean(0)
        # single precision leaves as much in the directions that a layer does not use
        rank = int(torch.linalg.matrix_rank(centred, rtol=1e-5))
        wanted = min(rank, self.components or max(len(x) // 10, 1))
        if not wanted:
            return x.new_zeros(0, x.shape[1]), True
        start = torch.randn(wanted, wanted, generator=generator, dtype=torch.float64, device=generator.device)
        settings = {"whiten": "unit-variance", "max_iter": self.max_steps, "tol": _TOL}
        ica = _fast_ica()(wanted, w_init=start.cpu().numpy(), **settings)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ica.fit(centred.cpu().numpy())
        converged = not any("converge" in str(one.message) for one in said)
        return torch.as_tensor(ica.components_).to(x), converged


def _fast_ica() -> Any:
    try:
        return importlib.import_module("sklearn.decomposition").FastICA
    except ImportError:
        raise MissingPackageError('IcaDirection needs scikit-learn: pip install "tdhook-train[probes]"') from None
