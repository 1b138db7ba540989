"""Which input features an output reacts to: its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.attribution.attribution import Attribution
from tdhook_train.errors import SettingsError
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of
from tdhook_train.method import Seen

__all__ = ["Saliency"]


@dataclass(frozen=True)
class Saliency(Attribution):
    """How much an output changes with each input feature, to first order.

    One forward pass for all targets, and one backward pass for each.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets`` and ``rows``.
        score: the gradient as it is, its absolute value (the paper's), or its square.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, in units of the target by units of the
        feature.

    Source: Simonyan et al. 2013, arXiv:1312.6034.
    """

    score: Literal["signed", "absolute", "squared"] = "signed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in _SCORES:
            raise SettingsError(f"score={self.score!r} is none of {', '.join(map(repr, _SCORES))}")

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Differentiate every target with respect to every floating input."""
        inputs, index = self._moving(seen, model), self._index(seen, model)
        given = inputs | self._beside(seen, model)
        batch = TensorDict({key: value[index] for key, value in given.items()}, batch_size=[len(index)])
        found: dict[str, Tensor] = {}

        def total(outputs: TensorDictBase, name: str) -> Tensor:
            if not found:
                found.update(self._explained(outputs, batch, model))
            return found[name].sum()  # rows do not mix: each keeps a gradient of its own

        targets = list(self._explained(seen.batch, seen.batch, model))
        with model.run(batch) as run:
            grads = {k: run.get_input_grad(model.input_site(k)) for k, v in inputs.items() if v.is_floating_point()}
            run.backward([lambda outputs, name=name: total(outputs, name) for name in targets])
        attr = {("attr", *path_of(key)): self._scored(grad.resolve()) for key, grad in grads.items()}
        return TensorDict(attr, batch_size=[len(index)])

    def _scored(self, gradients: Tensor) -> Tensor:
        values = _SCORES[self.score](gradients)
        return values.movedim(0, 1) if self._many else values[0]


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "signed": torch.Tensor.clone,
    "absolute": torch.abs,
    "squared": torch.square,
}
