"""How far the layers of a model in a fit have come from where they were."""

from __future__ import annotations

from typing import Any

from tdhook_train.callbacks.observer_callback import ObserverCallback
from tdhook_train.hooks import Selection
from tdhook_train.latent import Cka

__all__ = ["SimilarityCallback"]


class SimilarityCallback(ObserverCallback):
    """Debiased linear CKA of each layer to itself at other moments, while a model is fitted.

    Args:
        layers: paths, patterns, module classes or predicates.
        to: ``"initial"``, ``"previous"`` (the measurement before), ``"layers"`` (each to each), or several of these.
        reference: weights of a checkpoint to compare with: see :class:`~tdhook_train.latent.Cka`.
        options: of :class:`ObserverCallback`; give it a ``batch`` or a ``dataloader``.
    """

    def __init__(
        self,
        layers: Selection = "**",
        to: str | tuple[str, ...] = ("initial", "previous"),
        *,
        reference: Any = None,
        name: str = "similarity",
        **options: Any,
    ) -> None:
        super().__init__(Cka(layers=layers, to=to, reference=reference), name=name, **options)
