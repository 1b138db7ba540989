"""What the outputs of a model in a fit rest on."""

from __future__ import annotations

from typing import Any

from tdhook_train.attribution import IntegratedGradients
from tdhook_train.callbacks.observer_callback import ObserverCallback
from tdhook_train.method import Method

__all__ = ["AttributionCallback"]


class AttributionCallback(ObserverCallback):
    """Attributions of outputs to inputs while a model is fitted.

    Args:
        method: any of :mod:`tdhook_train.attribution`; integrated gradients of 64 rows by default.
        options: of :class:`ObserverCallback`.

    Loggers are told what is not one value a row of the batch: nothing of integrated gradients, whose maps lie in the
    row and are drawn by ``report=True``.

    Example:
        >>> from tdhook_train.attribution import Saliency
        >>> method = Saliency(targets=("output", 3), rows=16)
        >>> callback = AttributionCallback(method, every_n_epochs=1, batch=(images, labels))
    """

    def __init__(self, method: Method | None = None, *, name: str = "attribution", **options: Any) -> None:
        super().__init__(method or IntegratedGradients(rows=64), name=name, **options)
