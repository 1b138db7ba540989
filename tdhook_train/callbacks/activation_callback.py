"""The activations of a model in a fit, kept."""

from __future__ import annotations

from typing import Any

from tdhook_train.callbacks.observer_callback import ObserverCallback
from tdhook_train.hooks import Selection
from tdhook_train.latent import ActivationCache

__all__ = ["ActivationCallback"]


class ActivationCallback(ObserverCallback):
    """Streams activations to the buffer while a model is fitted: a row a measurement, with values for some inputs.

    Args:
        layers: paths, patterns, module classes or predicates.
        keep: inputs whose activations are kept at each measurement, spread evenly over the batch; all if None.
        options: of :class:`ObserverCallback`; ``limits`` bounds what is kept on the disk.

    Loggers are told nothing: a row is ``("activation", layer)`` [batch, *unit], for as many inputs as are kept.

    Example:
        >>> limits = {"max_bytes": 2**30, "keep": "log-spaced"}
        >>> callback = ActivationCallback("encoder.*", keep=32, dataloader=val_loader, limits=limits)
    """

    def __init__(
        self, layers: Selection = "**", *, keep: int | None = 64, name: str = "activations", **options: Any
    ) -> None:
        super().__init__(ActivationCache(layers, keep), name=name, **options)
