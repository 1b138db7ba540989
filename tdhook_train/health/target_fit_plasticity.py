"""Whether a network can still learn something new as well as a fresh one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import NetworkError, SettingsError
from tdhook_train.health.fitting import Member, fitted, outputs_of, rows_of
from tdhook_train.hooks import HookedModel
from tdhook_train.isolation import private_copy, redraw
from tdhook_train.keys import split_key
from tdhook_train.method import Method, Seen
from tdhook_train.ops.slopes import slopes
from tdhook_train.ops.targets import Target, first_floating, given_by, refuse_unknown
from tdhook_train.ops.units import evenly_spaced

__all__ = ["TargetFitPlasticity"]

_SEEDS = 2**62
_NOT_FINITE, _NO_TARGETS, _NO_INITIAL = 1, 2, 3


@dataclass(frozen=True)
class TargetFitPlasticity(Method):
    """How much worse a network learns random targets than a fresh one: its loss after some steps, over that one's.

    About 1 of a network that has lost nothing, and above 1 of one that has: dead units, saturated ones, a narrow
    representation. Targets are what networks of the same architecture with new weights give out on the batch, with a
    mean of 0 and a variance of 1 per feature over the rows, on top of the mean of what the network that learns gives
    out: an offset is no part of what it has to learn. Network and fresh network learn the same targets by the same
    steps, each target with a fresh network of its own.

    All is done on private copies; everything drawn comes from the method's own generator. Costs ``steps`` forward and
    backward passes of ``rows`` rows for 2 × ``draws`` networks, which run as one batch where ``torch.func`` can do
    that, and otherwise one after the other: 2 to 5 seconds for a small MLP on one core, so for rare ticks.

    Args:
        output: what is trained: output key, ``("output", 3)`` for one feature; the first floating-point output by
            default. Parts of the network that run only after it are left out.
        draws: how many targets.
        steps: of Adam, on all rows.
        lr: its step size.
        rows: learn on at most this many rows, spread evenly; of a network that handles time, always all.
        fresh: whether the fresh networks are drawn anew by ``reset_parameters`` of their parts, or are the network at
            ``"initial"``-isation, which knows of an initialisation of one's own but is one draw only.

    Writes:
        ``target_fit``: the sum over targets of the losses of the network over that of the fresh ones.
        ``target_fit_loss``, ``target_fit_loss_fresh`` [draw]: mean squared errors; 1 is what guessing the mean gives.
        ``target_fit_reason``: why a NaN (see ``legend``).

    Raises:
        NetworkError: the output depends on a parameter that no part of the network knows how to draw.
        TargetError: no network gives the output out.

    Source: Lyle et al. 2023, arXiv:2303.01486 (plasticity as the loss after optimising on new targets); random networks
    as targets: Lyle et al. 2022, arXiv:2204.09560, definition of target-fitting capacity.
    """

    output: Target = None
    draws: int = 8
    steps: int = 200
    lr: float = 1e-3
    rows: int = 256
    fresh: Literal["drawn", "initial"] = "drawn"

    looks_back: ClassVar[bool] = False
    shown: ClassVar[tuple[str, ...]] = ("target_fit",)
    writes: ClassVar[Mapping[str, str]] = {
        "target_fit": "",
        "target_fit_loss": "draw",
        "target_fit_loss_fresh": "draw",
        "target_fit_reason": "",
    }
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "target_fit_reason": {
            0: "measured",
            _NOT_FINITE: "the network's outputs, or its losses, are not finite",
            _NO_TARGETS: "random networks give out the same on all rows: there is nothing to learn",
            _NO_INITIAL: "the network at initialisation is not known",
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("draws", "steps", "rows"):
            if getattr(self, name) < 1:
                raise SettingsError(f"TargetFitPlasticity needs {name} of 1 or more, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise SettingsError(f"TargetFitPlasticity needs lr above 0, got {self.lr}")
        if self.fresh not in ("drawn", "initial"):
            raise SettingsError(f"TargetFitPlasticity: fresh={self.fresh!r} is none of 'drawn', 'initial'")
        if callable(self.output):
            raise SettingsError(f"TargetFitPlasticity needs the key of an output, got {self.output!r}")
        if self.output is not None:
            split_key(self.output)

    def concerns(self, model: HookedModel) -> bool:
        """Whether the network gives the output, and has weights."""
        given = self.output is None or given_by({"": self.output}, model.out_keys)
        return bool(given) and next(model.module.parameters(), None) is not None

    def check(self, models: Mapping[str, HookedModel]) -> None:
        """Refuse an output that no network gives as well."""
        super().check(models)
        if self.output is not None:
            refuse_unknown(self.output, {name: model.out_keys for name, model in self.chosen(models).items()})

    @torch.inference_mode(False)  # what is trained goes into a graph, which weights made in inference cannot
    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Train copies of the network and fresh ones towards the same targets."""
        batch = rows_of(model, seen.batch, evenly_spaced(len(seen.batch), self.rows))
        output = first_floating(seen.batch, model.out_keys) if self.output is None else self.output
        generator = torch.Generator().manual_seed(0) if seen.generator is None else seen.generator
        seeds = torch.randint(_SEEDS, (2, self.draws), generator=generator, device=generator.device).tolist()
        targets = _standardised(outputs_of([_drawn(model, output, batch, seed) for seed in seeds[0]], batch))
        if self.fresh == "initial" and seen.initial is None:
            return self._unknown(_NO_INITIAL)
        if targets is None:
            return self._unknown(_NO_TARGETS)
        now = [Member(model, private_copy(model.module), output) for _ in seeds[0]]
        fresh = [self._fresh(seen, model, output, batch, seed) for seed in seeds[1]]
        means = outputs_of([*now, *fresh], batch).mean(1, keepdim=True)
        losses = fitted([*now, *fresh], batch, means + targets.repeat(2, 1, 1), self.steps, self.lr).double().cpu()
        own, other = losses.split(self.draws)
        ratio = own.sum() / other.sum()
        if not ratio.isfinite():
            return self._unknown(_NOT_FINITE)
        return self._row(ratio, own, other, 0)

    def _fresh(self, seen: Seen, model: HookedModel, output: Target, batch: TensorDictBase, seed: int) -> Member:
        if self.fresh == "initial" and seen.initial is not None:
            return Member(model, private_copy(seen.initial.module), output)
        return _drawn(model, output, batch, seed)

    def _unknown(self, reason: int) -> TensorDictBase:
        nan = torch.full((self.draws,), torch.nan, dtype=torch.float64)
        return self._row(nan[0], nan, nan.clone(), reason)

    def _row(self, ratio: Tensor, own: Tensor, other: Tensor, reason: int) -> TensorDictBase:
        code = torch.tensor(reason, dtype=torch.int8)
        return TensorDict(dict(zip(self.writes, (ratio, own, other, code), strict=True)), batch_size=[])


def _drawn(model: HookedModel, output: Target, batch: TensorDictBase, seed: int) -> Member:
    """Copy a network with new weights.

    Raises:
        NetworkError: the output depends on a weight that stays as it was.
    """
    member = Member(model, private_copy(model.module), output)
    left = redraw(member, seed)
    if left:
        parameters = dict(member.requires_grad_(True).named_parameters())
        with torch.enable_grad():
            moved = slopes(member(batch).square().sum(), [parameters[name] for name in left])
        member.requires_grad_(False)
        needed = [name.removeprefix("net.") for name, slope in zip(left, moved, strict=True) if slope.any()]
        if needed:
            raise NetworkError(
                f"TargetFitPlasticity needs networks with new weights, but no part of {model.title} knows how to draw "
                f"{', '.join(map(repr, needed))}: give the module that holds it a reset_parameters()"
            )
    return member


def _standardised(outputs: Tensor) -> Tensor | None:
    """Bring ``[draw, row, feature]`` to mean 0 and variance 1 over rows; None where nothing varies."""
    mean = outputs.mean(1, keepdim=True)
    spread = outputs.std(1, correction=0, keepdim=True)
    varies = spread > 4 * torch.finfo(outputs.dtype).eps * mean.abs()
    return torch.where(varies, (outputs - mean) / spread, 0.0) if varies.any() else None
