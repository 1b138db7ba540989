"""Which parts of a model in a fit carry an output."""

from __future__ import annotations

from typing import Any

from tdhook_train.callbacks.observer_callback import ObserverCallback
from tdhook_train.hooks import Selection
from tdhook_train.latent import ActivationPatching

__all__ = ["PatchingCallback"]


class PatchingCallback(ObserverCallback):
    """Exact effects of replacing layers and units by their values in paired rows, while a model is fitted.

    Args:
        layers: paths, patterns, module classes or predicates of the layers to patch.
        metric: an output, a feature of one, a function of the outputs, or several: ``targets`` of
            :class:`~tdhook_train.latent.ActivationPatching`.
        pairs: number of paired rows.
        options: of :class:`ObserverCallback`.

    Loggers are told, for each metric, ``patching/effect/<metric>`` (layers), ``patching/unit_effect/<metric>``,
    ``patching/gap/<metric>`` (between paired rows), and the parts of that gap, ``patching/normalised/<metric>`` and
    ``patching/unit_normalised/<metric>``. A metric without a name is called by its output.

    Example:
        >>> callback = PatchingCallback(["encoder.0", "encoder.2"], ("output", 3), 32, every_n_epochs=1)
    """

    def __init__(
        self, layers: Selection = "**", metric: Any = None, pairs: int = 64, *, name: str = "patching", **options: Any
    ) -> None:
        super().__init__(ActivationPatching(layers, metric, pairs), name=name, **options)
