"""Measuring a training while it runs: when due, on what, at what cost, into which rows."""

from tdhook_train.observer.live_edit import LiveEdit
from tdhook_train.observer.meter import Meter
from tdhook_train.observer.observer import Observer
from tdhook_train.observer.probe_set import ProbeSet
from tdhook_train.observer.subject import Subject

__all__ = ["LiveEdit", "Meter", "Observer", "ProbeSet", "Subject"]
