"""How often a callback measures, in Lightning's words."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from tdhook_train.errors import SettingsError
from tdhook_train.schedule import At, Clock, Every, Trigger, When

__all__ = ["Moment", "by_default", "trigger"]

Moment = Literal["training", "validation", "end"]


_MOMENTS = {"validation": "each validation", "end": "the end of the training"}


def trigger(
    *,
    every_n_train_steps: int | None,
    every_n_epochs: int | None,
    train_time_interval: timedelta | None,
    when: Trigger | None,
    at: Moment,
) -> Trigger | None:
    """Bring a cadence to one form; None where nothing was said.

    Raises:
        SettingsError: something else than a trigger or a time.
        MisconfigurationException: more than one, or one for moments each of which is measured.
    """
    if when is not None and not isinstance(when, Trigger | Mapping):
        raise SettingsError(f"when={when!r} is no trigger; e.g. when=Every(optim_steps=100) | At(0)")
    if train_time_interval is not None and not isinstance(train_time_interval, timedelta):
        raise SettingsError(f"train_time_interval={train_time_interval!r} is no timedelta; e.g. timedelta(minutes=5)")
    cadences = {
        "every_n_train_steps": None if every_n_train_steps is None else Every(optim_steps=every_n_train_steps),
        "every_n_epochs": None if every_n_epochs is None else Every(epochs=every_n_epochs),
        "train_time_interval": None
        if train_time_interval is None
        else Every(seconds=train_time_interval.total_seconds()),
    }
    given = {name: found for name, found in cadences.items() if found is not None}
    names = [*given, *([] if when is None else ["when"])]
    if len(names) > 1:
        raise MisconfigurationException(f"one cadence is wanted, and {' and '.join(names)} were given")
    if at != "training":
        if names:
            raise MisconfigurationException(f"at={at!r} measures at {_MOMENTS[at]}, and takes no {names[0]}")
        return When(_always if at == "validation" else _never)
    return At(0) | next(iter(given.values())) if given else when


def by_default(trainer: Trainer) -> Trigger:
    """Step 0 and every 2 % of the fit; every 100 steps where its length is not known."""
    total = trainer.estimated_stepping_batches
    known = 0 < total < float("inf")
    return At(0) | (Every(fraction=0.02, total_steps=int(total)) if known else Every(optim_steps=100))


def _always(clock: Clock) -> bool:  # noqa: ARG001 - asked only when there is something to measure
    return True


def _never(clock: Clock) -> bool:  # noqa: ARG001 - what is left is measured at the end
    return False
