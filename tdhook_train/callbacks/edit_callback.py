"""A change of the model in a fit itself."""

from __future__ import annotations

from typing import Any

from tdhook_train.callbacks.observer_callback import ObserverCallback
from tdhook_train.edit import Edit, Rewrite
from tdhook_train.observer import LiveEdit
from tdhook_train.schedule import Trigger

__all__ = ["EditCallback"]


class EditCallback(ObserverCallback):
    """Changes the live model, on request: the one callback here that does not leave the fit as it was.

    In several processes (DDP) all replicas are changed: each holds the spans of the first, and gets what it wrote.

    Args:
        edit: an :class:`~tdhook_train.Edit`, held for a span (``Ablate(...)``, ``SteeringVectors(...)``), or a
            :class:`~tdhook_train.Rewrite`, written once each time it is due (``ReDo()``).
        when: from when on, or when once.
        steps: how many optimizer steps a span lasts; to the end of the fit, if None.
        options: of :class:`ObserverCallback`.

    Loggers are told ``edit/active`` of a span, 1 where it begins and 0 where it ends, and of weights written what the
    edit writes.

    Example:
        >>> from tdhook_train import Every
        >>> from tdhook_train.health import ReDo
        >>> callback = EditCallback(ReDo(), when=Every(optim_steps=1000))
    """

    def __init__(
        self,
        edit: Edit | Rewrite,
        *,
        when: Trigger,
        steps: int | None = None,
        name: str = "edit",
        **options: Any,
    ) -> None:
        super().__init__({}, when=when, name=name, edits={name: LiveEdit(edit, when, steps)}, **options)
