"""What each layer knows of the network's output, in whatever directions it says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdhook_train.errors import SettingsError
from tdhook_train.latent.residual_lens import LENS_REASONS, Read, ResidualLens, Tail
from tdhook_train.ops.folds import fold_of
from tdhook_train.ops.lens import kl, spread
from tdhook_train.ops.translator import Translator, by_lbfgs, by_ridge

__all__ = ["TunedLens"]

_ONE_GROUP = 6


@dataclass(frozen=True)
class TunedLens(ResidualLens):
    """What the head makes of each layer after the best affine translation into the directions that it listens to.

    For each layer ``A h + b`` is fitted so that the head's output comes near the network's: in KL for logits, in
    squared error (against the output's spread) for values. ``penalty ‖Θ‖²`` holds A to the identity, Θ being A - I in
    units of the spread of the layer and of the stream. Every row is read by a translator that was fitted to other
    trajectories. The translator is a probe: what it finds is in the layer, which need not be how the network uses it.

    A linear head that gives out values is solved exactly, by ridge regression; a linear head of logits, a convex
    problem, by L-BFGS without a pass. Any other head takes a pass forward and back for each step: at most 1.25 ×
    ``steps`` for each layer and fold; then two more a layer.

    Settings as for :class:`.ResidualLens`, and

    Args:
        folds: of trajectories; fewer trajectories leave one out at a time.
        penalty: in units of the loss, nats or shares of the spread.
        steps: at most so many of L-BFGS.

    Writes:
        ``lens``, ``kl`` and ``agreement`` or ``mse`` and ``r2``, ``reason`` as :class:`LogitLens`, on held-out rows;
        ``kl_untuned`` and so on [layer]: the same without a translator, the logit lens. ``converged`` [layer]: see
        ``legend``.

    Raises:
        PathError: no module is the head. TargetError: the output is no logits. NetworkError: several heads.

    Source: Belrose et al. 2023, arXiv:2303.08112, section 3 (there by stochastic gradient descent, all weights kept).
    """

    rows: int = 512
    folds: int = 5
    penalty: float = 1e-4
    steps: int = 100

    by_trajectory: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...] | None] = ("kl", "agreement", "mse", "r2")
    writes: ClassVar[Mapping[str, str]] = {
        "lens": "layer batch *feature",
        **dict.fromkeys(("kl", "agreement", "mse", "r2", "reason", "converged"), "layer"),
        **dict.fromkeys(("kl_untuned", "agreement_untuned", "mse_untuned", "r2_untuned"), "layer"),
    }
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "reason": LENS_REASONS | {_ONE_GROUP: "all rows are of one trajectory: none can be held out"},
        "converged": {0: "not in every fold, or not fitted", 1: "in every fold"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 2:
            raise SettingsError(f"TunedLens needs at least 2 folds, got folds={self.folds}")
        if not 0 < self.penalty < float("inf"):
            raise SettingsError(f"TunedLens needs a penalty above 0, got {self.penalty}")
        if self.steps < 1:
            raise SettingsError(f"TunedLens needs steps of 1 or more, got {self.steps}")

    def _read(self, value: Tensor, axis: int, tail: Tail, groups: Tensor) -> Read:
        if len(groups.unique()) < 2:
            return Read(torch.full_like(tail.final, torch.nan), self._nothing(tail), _ONE_GROUP)
        folds, layer, untuned = fold_of(groups, self.folds).to(value.device), value.movedim(axis, -1), tail(value)
        head = _linear(tail, value, untuned)
        translated = torch.empty_like(layer, dtype=torch.float64)
        converged = True
        for fold in range(int(folds.max()) + 1):
            train = (folds != fold).nonzero()[:, 0]
            translator, rests = self._fit(layer[train], axis, tail, train, head)
            translated[folds == fold] = translator(layer[folds == fold])
            converged &= rests
        lens = tail(translated.movedim(-1, axis))
        more = self._scores(tail, lens) | _untuned(self._scores(tail, untuned))
        return Read(lens, more | {"converged": torch.tensor(converged, dtype=torch.int8)})

    def _nothing(self, tail: Tail) -> dict[str, Tensor]:
        nothing = super()._nothing(tail)
        return nothing | _untuned(nothing) | {"converged": torch.tensor(0, dtype=torch.int8)}

    def _fit(
        self, layer: Tensor, axis: int, tail: Tail, train: Tensor, head: nn.Linear | None
    ) -> tuple[Translator, bool]:
        """Fit a translator to some rows, ``layer`` of them, and say whether that came to rest."""
        final = tail.final[train].double()
        start = Translator.identity(layer, tail.stream.movedim(axis, -1)[train])
        total = spread(final).nan_to_num(1.0)
        if head is not None and self.output_is == "values":
            rows = layer.double().flatten(0, -2)
            missing = final.reshape(len(rows), -1) - _of_linear(head, rows)
            return by_ridge(start, rows, missing, head.weight, self.penalty * float(total)), True
        rest = tail.on(train)

        def loss(translator: Translator) -> Tensor:
            moved = translator(layer)
            early = rest(moved.movedim(-1, axis)) if head is None else _of_linear(head, moved)
            early = early.reshape(final.shape).double()
            return kl(final, early) if self.output_is == "logits" else (final - early).square().sum() / total

        with torch.enable_grad():
            return by_lbfgs(start, loss, self.penalty, self.steps)


def _linear(tail: Tail, value: Tensor, untuned: Tensor) -> nn.Linear | None:
    """Return the head if it is a linear layer that makes the output alone, of the stream and of a layer."""
    head = tail.model.module_of(tail.head)
    if not isinstance(head, nn.Linear):
        return None
    for given, found in ((tail.stream, tail.final), (value, untuned)):
        alone = _of_linear(head, given)
        if alone.numel() != found.numel() or not torch.allclose(alone.reshape(found.shape), found.double(), 1e-4, 1e-5):
            return None
    return head


def _of_linear(head: nn.Linear, stream: Tensor) -> Tensor:
    bias = None if head.bias is None else head.bias.detach().double()
    return functional.linear(stream.double(), head.weight.detach().double(), bias)


def _untuned(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}_untuned": value for name, value in found.items()}
