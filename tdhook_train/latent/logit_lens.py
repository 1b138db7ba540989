"""What a network would say if it ended after each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdhook_train.latent.residual_lens import LENS_REASONS, Read, ResidualLens, Tail

__all__ = ["LogitLens"]


@dataclass(frozen=True)
class LogitLens(ResidualLens):
    """What the head makes of the residual stream after each layer, and how near that is to the network's output.

    What the head takes in is set to the layer's value, and the rest of the network runs: exactly its own head, final
    normalisation and all. Where a layer speaks in other directions than the head listens to, the lens is blind to what
    it says; see :class:`TunedLens`. Costs a pass for each layer, and one, over at most
    ``rows`` rows.

    Settings as for :class:`.ResidualLens`.

    Writes:
        ``lens`` [layer, batch, *feature]: the output, read after the layer. Of logits ``kl`` [layer], the mean of
        KL(network ‖ lens) in nats, and ``agreement`` [layer], the share of rows with the same likeliest category; of
        values ``mse`` [layer], in squares of their unit, and ``r2`` [layer], the share of the output's spread that the
        lens has, all features together. ``reason`` [layer]: why a NaN (see ``legend``).

    Raises:
        PathError: no module is the head. TargetError: the output is no logits. NetworkError: several heads.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023, arXiv:2303.08112, section 2.
    """

    shown: ClassVar[tuple[str, ...] | None] = ("kl", "agreement", "mse", "r2")
    writes: ClassVar[Mapping[str, str]] = {
        "lens": "layer batch *feature",
        **dict.fromkeys(("kl", "agreement", "mse", "r2", "reason"), "layer"),
    }
    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {"reason": LENS_REASONS}

    def _read(self, value: Tensor, axis: int, tail: Tail, groups: Tensor) -> Read:  # noqa: ARG002 - nothing is fitted
        lens = tail(value)
        return Read(lens, self._scores(tail, lens))
