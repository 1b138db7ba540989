"""What each input feature contributes to an output through some units of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tdhook_train.errors import PathError, SettingsError, did_you_mean
from tdhook_train.explain import Compared, Found, Point, Problem
from tdhook_train.explain.integrated import Integrated
from tdhook_train.hooks import HookedModel
from tdhook_train.hooks.paths import Selector, shown
from tdhook_train.keys import path_of
from tdhook_train.ops.slopes import slopes

__all__ = ["InputConductance"]


@dataclass(frozen=True)
class InputConductance(Integrated, Compared):
    """How much each input feature contributes to an output through some units of a layer, compared with a baseline.

    Integrated gradients of which only that part is kept which goes back through the units: all shares sum to the
    units' :class:`Conductance`, and through all units of a layer that everything goes through, they are
    :class:`IntegratedGradients`. A forward pass over the path for all targets; each costs a backward pass.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers`` (before the units' layer,
            instead of inputs), ``side``, ``reduction`` and ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.
        points: see :class:`Integrated`, as are ``quadrature`` and ``rows_per_pass``.
        through: the layer whose units are meant, by what it gives out: a path, or a pattern, module class or predicate
            that names one.
        units: numbers of units (channels of a convolution), which count together; all by default.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in units of the target.

    Source: Dhamdhere et al. 2018, arXiv:1805.12233.
    """

    through: Selector | None = None
    units: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.through:
            raise SettingsError(f"InputConductance needs through, the path of a layer, got {self.through!r}")
        if self.units is None:
            return
        units = tuple(self.units)
        if not units or not all(isinstance(unit, int) and unit >= 0 for unit in units):
            raise SettingsError(f"InputConductance needs units as numbers of 0 or more, got {self.units!r}")
        object.__setattr__(self, "units", units)

    def check(self, models: Mapping[str, HookedModel]) -> None:
        """Refuse a layer that no network has as well."""
        super().check(models)
        assert self.through is not None
        if not any(model.has(self.through) for model in self.chosen(models).values()):
            known = [path for model in models.values() for path in model.modules]
            near = did_you_mean(self.through, known) if isinstance(self.through, str) else ""
            raise PathError(f"through={shown(self.through)} matches no module{near}")

    def concerns(self, model: HookedModel) -> bool:
        """Leave out networks without the units' layer."""
        return super().concerns(model) and (self.through is None or bool(model.sites(self.through)))

    def explain(self, problem: Problem) -> Found:
        """Integrate what goes back through the units over the path."""
        slopes = self.integral(problem, problem.baseline, problem.point, partial(self._slopes, problem))
        return {
            ("attr", *path_of(site)): slopes[site] * (end - problem.baseline[site])[:, None]
            for site, end in problem.point.items()
        }

    def _slopes(self, problem: Problem, point: Point, index: Tensor, weight: Tensor) -> Iterator[Point]:
        """Yield ``Σ ∂F/∂y · ∂y/∂x`` over the units, times the weight, for one target after another."""
        site = self._layer(problem.model)
        calls: list[Tensor] = []

        def noted(value: Tensor) -> Tensor:
            calls.append(value)
            return value

        with torch.inference_mode(False), torch.enable_grad():
            leaves = {key: value.detach().clone().requires_grad_() for key, value in point.items()}
            with problem.model.bent({site: noted}):  # type: ignore[dict-item]
                found = problem(leaves, index)
        units = calls[0]
        kept = self._kept(problem.model, site, units) * weight.to(units.dtype).view(-1, *[1] * (units.ndim - 1))
        for column in found.unbind(1):
            (slope,) = slopes(column.sum(), [units], keep=True)
            yield dict(zip(leaves, slopes(units, list(leaves.values()), slope * kept, keep=True), strict=True))

    def _layer(self, model: HookedModel) -> str:
        assert self.through is not None
        sites = model.sites(self.through)
        if len(sites) != 1:
            raise PathError(
                f"InputConductance goes through one layer; through={shown(self.through)} names {list(sites)}"
            )
        return sites[0]

    def _kept(self, model: HookedModel, site: str, value: Tensor) -> Tensor:
        """Return 1 for the units that are meant and 0 for the others, to be multiplied with a layer's values."""
        if self.units is None:
            return torch.ones_like(value)
        axis = model.unit_axis(site, value)
        count = value.shape[axis]
        if max(self.units) >= count:
            raise SettingsError(f"units={self.units}: {site!r} has units 0 to {count - 1}, not {max(self.units)}")
        kept = torch.zeros(count, dtype=value.dtype, device=value.device)
        kept[list(self.units)] = 1
        return kept.view([-1 if i == axis % value.ndim else 1 for i in range(value.ndim)])
