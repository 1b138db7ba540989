"""What each layer of a model in a fit knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tensordict import TensorDictBase
from typing_extensions import override

from tdhook_train.callbacks.batches import as_tensordict
from tdhook_train.callbacks.observer_callback import ObserverCallback
from tdhook_train.errors import SettingsError, did_you_mean
from tdhook_train.hooks import Selection
from tdhook_train.latent import LogisticProbe, RidgeProbe
from tdhook_train.method import Method
from tdhook_train.ops.targets import named, read

__all__ = ["ProbeCallback"]


class ProbeCallback(ObserverCallback):
    """Linear probes of every layer while a model is fitted, beside their baselines and, in trajectories, a null.

    Args:
        layers: paths, patterns, module classes or predicates.
        target: what is read out: a key of the batch (``"target"`` is the second part of a tuple), a function of the
            batch, a list of these, or a mapping of names to these.
        probe: ``"ridge"``, ``"logistic"``, or a method of your own, which has layers and targets of its own. ``"auto"``
            is ridge for floating-point targets and logistic for whole numbers; where there are both, the latter have
            the row ``<name>.classes``.
        options: of :class:`ObserverCallback`.

    Loggers are told, for each target, means over layers: of ridge ``probe/r2/<target>`` (out of sample),
    ``probe/r2_observation/<target>`` (of the inputs themselves), ``probe/r2_initial/<target>`` (of the network at
    initialisation) and in trajectories ``probe/r2_null/<target>``; of logistic ``balanced_accuracy``, ``auc`` and
    ``log_loss`` with the same endings.

    Raises:
        SettingsError: a probe of no kind.
        KeyMissingError: a target that the ``batch`` has not.

    Example:
        >>> callback = ProbeCallback("encoder.*", {"speed": "target", "kind": "2"}, dataloader=val_loader)
    """

    def __init__(
        self,
        layers: Selection = "**",
        target: Any = "target",
        *,
        probe: Literal["auto", "ridge", "logistic"] | Method = "auto",
        name: str = "probe",
        **options: Any,
    ) -> None:
        if not isinstance(probe, Method) and probe not in ("auto", *_KINDS):
            near = did_you_mean(str(probe), ("auto", *_KINDS))
            raise SettingsError(f"probe={probe!r} is no method{near}")
        if isinstance(probe, Method) and not (_is(layers, "**") and _is(target, "target")):
            raise SettingsError(f"probe={probe!r} has layers and a target of its own: leave those of the callback out")
        self._layers, self._target = layers, target
        method = probe if isinstance(probe, Method) else _KINDS.get(probe, RidgeProbe)(layers=layers, target=target)
        super().__init__(method, name=name, **options)
        self._auto = probe == "auto"
        if (batch := options.get("batch")) is not None and not isinstance(probe, Method):
            known = as_tensordict(batch)
            for one in named(target).values():
                read(known, one)  # or raise

    @override
    def methods_for(self, batch: TensorDictBase) -> Mapping[str, Method | Sequence[Method]]:
        """Choose by what the targets are."""
        if not self._auto:
            return self.methods
        by_kind: dict[str, dict[str, Any]] = {"ridge": {}, "logistic": {}}
        for name, target in named(self._target).items():
            kind = "ridge" if read(batch, target).is_floating_point() else "logistic"
            by_kind[kind][name] = target
        chosen = {kind: _KINDS[kind](layers=self._layers, target=own) for kind, own in by_kind.items() if own}
        (row,) = self.methods
        if len(chosen) == 1:
            return {row: next(iter(chosen.values()))}
        return {row: chosen["ridge"], f"{row}.classes": chosen["logistic"]}


_KINDS: dict[str, type[RidgeProbe] | type[LogisticProbe]] = {"ridge": RidgeProbe, "logistic": LogisticProbe}


def _is(given: Any, text: str) -> bool:
    return isinstance(given, str) and given == text
