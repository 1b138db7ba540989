"""Checkpoints that a training left, measured after the fact."""

from tdhook_train.checkpoints.comparing import differences
from tdhook_train.checkpoints.formats import Checkpoint, read
from tdhook_train.checkpoints.sweep import sweep

__all__ = ["Checkpoint", "differences", "read", "sweep"]
