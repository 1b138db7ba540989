"""Whether a critic's values are the returns that came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import TargetError
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import dotted, split_key
from tdhook_train.method import Method, Seen
from tdhook_train.ops.targets import given_by, read, refuse_unknown
from tdhook_train.seen import given_out

__all__ = ["ValueCalibration"]

_NOT_FINITE, _RETURNS_SAME, _VALUES_SAME = 1, 2, 3


@dataclass(frozen=True)
class ValueCalibration(Method):
    """How well predicted values agree with the returns held in the batch, scale and offset told apart.

    The explained variance forgives an offset, R² does not: ``V = R + 5`` has an explained variance of 1, a bias of 5,
    and an R² far below 0. The slope is that of the least-squares line of returns over values: 1 of a calibrated critic,
    below 1 of one that exaggerates. Costs no pass of its own.

    Returns that are bootstrapped from the critic itself (λ-returns, TD targets) agree with it by construction, more so
    the smaller λ is.

    Args:
        values: output key; a feature of it as ``("q", 0)``.
        returns: key of the batch, as many numbers as the values: every one counts as a sample.

    Writes:
        ``explained_variance``: 1 - Var(R - V) / Var(R). ``value_r2``: 1 - E(R - V)² / Var(R). ``value_slope``:
        Cov(R, V) / Var(V). ``value_bias``: E(V - R), in units of the returns. ``value_reason``: why some are NaN (see
        ``legend``): the first two where the returns are all the same, the slope where the values are, all four where
        either is not finite.

    Raises:
        TargetError: no network gives the values out, or there are more or fewer returns than values.
        KeyMissingError: the batch holds no returns of that name.

    Source: explained variance and bias as PPO implementations log them; R² and the slope as in linear regression.
    """

    values: NestedKey = "state_value"
    returns: NestedKey = "value_target"

    looks_back: ClassVar[bool] = False
    shown: ClassVar[tuple[str, ...]] = ("explained_variance", "value_r2", "value_slope", "value_bias")
    writes: ClassVar[Mapping[str, str]] = dict.fromkeys((*shown, "value_reason"), "")
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "value_reason": {
            0: "all are known",
            _NOT_FINITE: "values or returns are not finite",
            _RETURNS_SAME: "the returns are all the same",
            _VALUES_SAME: "the values are all the same",
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        split_key(self.values)
        split_key(self.returns)

    def concerns(self, model: HookedModel) -> bool:
        """Whether the network gives the values out."""
        return bool(given_by({"values": self.values}, model.out_keys))

    def check(self, models: Mapping[str, HookedModel]) -> None:
        """Refuse values that no network gives as well."""
        super().check(models)
        refuse_unknown(self.values, {name: model.out_keys for name, model in self.chosen(models).items()})

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Compare them."""
        values, returns = given_out(seen, model, self.values).detach(), read(seen.batch, self.returns).detach()
        if values.numel() != returns.numel():
            raise TargetError(
                f"ValueCalibration: {dotted(split_key(self.values)[0])!r} has {tuple(values.shape)}, the returns "
                f"{dotted(split_key(self.returns)[0])!r} {tuple(returns.shape)}"
            )
        v, r = values.double().flatten().cpu(), returns.double().flatten().cpu()
        of_values, of_returns = _variance(values), _variance(returns)
        residual, covariance = r - v, ((v - v.mean()) * (r - r.mean())).mean()
        finite = bool(v.isfinite().all() and r.isfinite().all())
        found = {
            "explained_variance": 1 - residual.var(correction=0) / of_returns,
            "value_r2": 1 - residual.square().mean() / of_returns,
            "value_slope": covariance / of_values,
            "value_bias": -residual.mean(),
        }
        reason = 0 if finite else _NOT_FINITE
        if finite and (of_returns.isnan() or of_values.isnan()):
            reason = _RETURNS_SAME if of_returns.isnan() else _VALUES_SAME
        row = {name: torch.where(torch.tensor(finite), value, torch.nan) for name, value in found.items()}
        return TensorDict({**row, "value_reason": torch.tensor(reason, dtype=torch.int8)}, batch_size=[])


def _variance(numbers: Tensor) -> Tensor:
    """NaN where they are all the same, up to the rounding of their dtype."""
    rounding = 4 * torch.finfo(numbers.dtype).eps if numbers.is_floating_point() else 0.0
    numbers = numbers.double().cpu()
    same = (numbers - numbers.mean()).abs().max() <= rounding * numbers.abs().max()
    return torch.where(same, torch.nan, numbers.var(correction=0))
