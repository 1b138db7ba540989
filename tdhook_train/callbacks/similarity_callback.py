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
        reference: weights to compare with as well: the path of a checkpoint of Lightning or of a state dict, or a state
            dict.
        options: of :class:`ObserverCallback`; give it a ``batch`` or a ``dataloader``.

    Loggers are told means over layers, ``similarity/cka_initial``, ``similarity/cka_previous``,
    ``similarity/cka_reference`` and, of up to 16 layers, ``similarity/cka_layers/<layer>``: 1 is the same up to
    rotation, shift and scale.

    Example:
        >>> callback = SimilarityCallback("encoder.*", reference="pretrained.ckpt", dataloader=val_loader)
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
