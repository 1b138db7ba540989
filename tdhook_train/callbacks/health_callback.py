"""Whether a model in a fit can still learn."""

from __future__ import annotations

from typing import Any

from tdhook_train.callbacks.observer_callback import ObserverCallback
from tdhook_train.health import DeadUnits, DormantUnits, EffectiveRank
from tdhook_train.hooks import Selection

__all__ = ["HealthCallback"]


class HealthCallback(ObserverCallback):
    """Units that sleep or are dead, and how many directions each layer uses, while a model is fitted.

    Args:
        layers: paths, patterns, module classes or predicates; all that give out numbers by default.
        taus: thresholds of dormancy.
        options: of :class:`ObserverCallback`.

    Loggers are told means over layers: ``health/dormant/<tau>`` and ``health/dead`` (shares of units),
    ``health/dormancy``, ``health/dead_unit``, ``health/effective_rank`` and ``health/effective_rank_centred``
    (directions). Of the network as a whole: ``health/dormant_pooled/<tau>`` and ``health/dead_pooled`` (shares of all
    units), ``health/effective_rank_pooled`` and ``health/effective_rank_centred_pooled`` (shares of all directions).

    Example:
        >>> callback = HealthCallback("encoder.*", every_n_epochs=1, batch=(images, labels))

    Source: :class:`~tdhook_train.health.DormantUnits`, :class:`~tdhook_train.health.DeadUnits`,
    :class:`~tdhook_train.health.EffectiveRank`.
    """

    def __init__(
        self,
        layers: Selection = "**",
        *,
        taus: tuple[float, ...] = (0.0, 0.025, 0.1),
        name: str = "health",
        **options: Any,
    ) -> None:
        methods = [DormantUnits(layers, taus), DeadUnits(layers), EffectiveRank(layers)]
        super().__init__(methods, name=name, **options)
