"""What each layer of a model in a fit knows."""

from __future__ import annotations

from typing import Any, Literal

from tdhook_train.callbacks.observer_callback import ObserverCallback
from tdhook_train.errors import SettingsError
from tdhook_train.hooks import Selection
from tdhook_train.latent import RidgeProbe
from tdhook_train.method import Method

__all__ = ["ProbeCallback"]


class ProbeCallback(ObserverCallback):
    """Linear probes of every layer while a model is fitted, beside their baselines and, in trajectories, a null.

    Args:
        layers: paths, patterns, module classes or predicates.
        target: what is read out: a key of the batch (``"target"`` is the second part of a tuple), a function of the
            batch, or a mapping of names to either.
        probe: ``"ridge"``, or a method of your own. ``"auto"`` is ridge.
        options: of :class:`ObserverCallback`.
    """

    def __init__(
        self,
        layers: Selection = "**",
        target: Any = "target",
        *,
        probe: Literal["auto", "ridge"] | Method = "auto",
        name: str = "probe",
        **options: Any,
    ) -> None:
        if not isinstance(probe, Method) and probe not in ("auto", "ridge"):
            raise SettingsError(f"probe={probe!r} is none of 'auto', 'ridge', nor a method")
        method = probe if isinstance(probe, Method) else RidgeProbe(layers=layers, target=target)
        super().__init__(method, name=name, **options)
