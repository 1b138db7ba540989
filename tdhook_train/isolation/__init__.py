"""Measuring somebody else's model without a trace: named networks, private copies, a guard in place."""

from tdhook_train.isolation.drawing import accompanied, draws, undrawn
from tdhook_train.isolation.in_place import in_place
from tdhook_train.isolation.networks import Network, is_loss, networks
from tdhook_train.isolation.redrawing import DrawnFrom, redraw
from tdhook_train.isolation.shadow import Shadow, private_copy, take_over
from tdhook_train.isolation.view import CopiesView, LiveView, ShadowView, View, isolated

__all__ = [
    "CopiesView",
    "DrawnFrom",
    "LiveView",
    "Network",
    "Shadow",
    "ShadowView",
    "View",
    "accompanied",
    "draws",
    "in_place",
    "is_loss",
    "isolated",
    "networks",
    "private_copy",
    "redraw",
    "take_over",
    "undrawn",
]
