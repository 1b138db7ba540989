"""How much a network's decisions move between two ticks, on the same states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of, split_key
from tdhook_train.method import Method, Seen
from tdhook_train.ops.divergence import flips, kl, normal_kl, relative_change, total_variation
from tdhook_train.ops.join import Labels
from tdhook_train.ops.targets import given_by, named, refuse_unknown
from tdhook_train.ops.units import evenly_spaced
from tdhook_train.seen import given_out, inputs_hash, row_before

__all__ = ["Churn"]

_USUAL = {
    "logits": ("logits",),
    "action_values": ("action_value",),
    "loc": ("loc",),
    "scale": ("scale",),
    "values": ("state_value", "state_action_value", "chosen_action_value"),
}
_NO_OTHER, _NOT_FINITE, _CONSTANT = 1, 2, 3
_REASONS = {
    0: "compared",
    _NO_OTHER: "there is no row before of these states",
    _NOT_FINITE: "the outputs are not finite, now or before",
}

_Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Churn(Method):
    """How much policy and values move from one tick to the next, on the same states: a ProbeSet.

    Every row holds the outputs, and is compared with the one before; on other states than that, and at the first tick,
    there is nothing to compare. Costs no pass of its own, and on disk the outputs of ``rows`` states a row. Where an
    output is not named, the first of the network's by its usual name is taken; what a network does not give out is not
    measured of it.

    Args:
        logits: of actions, ``[row, …, action]``: output key; ``"logits"`` by default.
        action_values: of a greedy policy, likewise; ``"action_value"`` by default. Counts where there are no logits.
        loc: means of a normal policy, ``[row, dimension]``; ``"loc"`` by default. Together with ``scale`` alone.
        scale: its standard deviations; ``"scale"`` by default.
        values: ``"state_value"``, ``"state_action_value"`` or ``"chosen_action_value"`` by default.
        rows: compare at most this many states, spread evenly over the batch.

    Writes:
        ``churn_flips``: share of states whose greedy action is another one, of logits or action values.
        ``churn_total_variation``: ½ Σ|π - π′| of the softmax of logits, mean over states. ``churn_kl``: KL(before ‖
        after) in nats, mean over states, of that or of the normal policy (a tanh after it changes nothing).
        ``churn_value``: E|V′ - V| over the standard deviation of V before. NaN with ``churn_policy_reason`` or
        ``churn_value_reason`` (see ``legend``). For the next tick ``("churn_outputs", name)`` [batch, feature] and
        ``churn_inputs``, a fingerprint.

    Raises:
        TargetError: an output that is named here is given out by no network; said before anything has run.

    Source: Schaul et al. 2022, arXiv:2206.00730.
    """

    logits: NestedKey | None = None
    action_values: NestedKey | None = None
    loc: NestedKey | None = None
    scale: NestedKey | None = None
    values: NestedKey | None = None
    rows: int = 2048

    shown: ClassVar[tuple[str, ...]] = ("churn_flips", "churn_total_variation", "churn_kl", "churn_value")
    writes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(shown, ""),
        "churn_policy_reason": "",
        "churn_value_reason": "",
        "churn_inputs": "",
        "churn_outputs": "batch *feature",
    }
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "churn_policy_reason": _REASONS,
        "churn_value_reason": _REASONS | {_CONSTANT: "the values before were the same for all states"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1:
            raise SettingsError(f"Churn needs rows of 1 or more, got {self.rows}")
        if (self.loc is None) != (self.scale is None):
            raise SettingsError(f"Churn needs loc and scale together, got loc={self.loc!r}, scale={self.scale!r}")
        for key in self._named():
            split_key(key)

    def concerns(self, model: HookedModel) -> bool:
        """Whether the network gives out something that can be compared."""
        return bool(self._keys(model))

    def check(self, models: Mapping[str, HookedModel]) -> None:
        """Refuse outputs that no network gives as well."""
        super().check(models)
        outputs = {name: model.out_keys for name, model in self.chosen(models).items()}
        refuse_unknown(self._named(), outputs)

    def labels(self, seen: Seen, model: HookedModel) -> Labels:  # noqa: ARG002 - the same for every network
        """The rows of the batch."""
        return {"batch": evenly_spaced(len(seen.batch), self.rows).tolist()}

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Features of different outputs are told apart by their names."""
        return tuple(name if name == "batch" else f"{key[-1]}.{name}" for name in super().dims(key, ndim))

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Compare with the row before."""
        index = evenly_spaced(len(seen.batch), self.rows)
        now = {name: given_out(seen, model, key).detach() for name, key in self._keys(model).items()}
        now = {name: value[index.to(value.device)] for name, value in now.items()}
        inputs = inputs_hash(seen, model)
        before = _before(row_before(seen, model), inputs, now)
        outputs = {("churn_outputs", name): value for name, value in now.items()}
        return TensorDict(_compared(before, now) | outputs | {"churn_inputs": inputs}, batch_size=[])

    def _named(self) -> list[Any]:
        return [given for name in _USUAL if (given := getattr(self, name)) is not None]

    def _keys(self, model: HookedModel) -> dict[str, Any]:
        """Say where the network gives out what."""
        found: dict[str, Any] = {}
        for name, usual in _USUAL.items():
            given = getattr(self, name)
            if given is not None:
                found |= {name: given} if given_by(named(given), model.out_keys) else {}
            elif (key := next((k for k in model.out_keys if path_of(k)[-1] in usual), None)) is not None:
                found[name] = key
        whole = {"loc", "scale"} <= set(found)  # one of the two alone says nothing
        return {name: key for name, key in found.items() if whole or name not in ("loc", "scale")}


def _before(row: TensorDictBase | None, inputs: Tensor, now: _Outputs) -> _Outputs | None:
    """Return the outputs at the tick before; None where they are not of these states."""
    if row is None or "churn_inputs" not in row or int(row["churn_inputs"]) != int(inputs):
        return None
    before = {name: row.get(("churn_outputs", name), None) for name in now}
    if any(before[name] is None or before[name].shape != now[name].shape for name in now):
        return None
    return {name: before[name].to(now[name]) for name in now}


def _policy(before: _Outputs, now: _Outputs) -> dict[str, Tensor]:
    """Compare decisions, in the mean over states; NaN where one of them is none."""
    one, two = ({name: value.double() for name, value in outputs.items()} for outputs in (before, now))
    found: dict[str, Tensor] = {}
    if (of := "logits" if "logits" in now else "action_values") in now:
        known = ~(one[of].sum(-1).isnan() | two[of].sum(-1).isnan())  # a logit of -inf is an action ruled out
        found["churn_flips"] = torch.where(known, flips(one[of], two[of]), torch.nan).mean()
    if "logits" in now:
        found["churn_total_variation"] = total_variation(one["logits"], two["logits"]).mean()
        found["churn_kl"] = kl(one["logits"], two["logits"]).mean()
    elif "loc" in now:
        found["churn_kl"] = normal_kl((one["loc"], one["scale"]), (two["loc"], two["scale"])).mean()
    return found


def _value(before: _Outputs, now: _Outputs) -> dict[str, Tensor]:
    return {"churn_value": relative_change(before["values"], now["values"])} if "values" in now else {}


def _compared(before: _Outputs | None, now: _Outputs) -> dict[NestedKey, Tensor]:
    """Compare what there is, and say why what is NaN is so."""
    out: dict[NestedKey, Tensor] = {}
    for found, kind in ((_policy(before or now, now), "policy"), (_value(before or now, now), "value")):
        if before is None:
            found, reason = {name: torch.full_like(value, torch.nan) for name, value in found.items()}, _NO_OTHER
        else:
            unknown = any(value.isnan() for value in found.values())
            reason = (_NOT_FINITE if kind == "policy" or not _finite(before, now) else _CONSTANT) if unknown else 0
        if found:
            out |= found | {f"churn_{kind}_reason": torch.tensor(reason, dtype=torch.int8)}
    return out


def _finite(before: _Outputs, now: _Outputs) -> bool:
    return bool(before["values"].isfinite().all() and now["values"].isfinite().all())
