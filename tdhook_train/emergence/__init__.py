"""When something was learned: onsets, change points and speeds of what was measured over training."""

from tdhook_train.emergence.change_points import ChangePoints, change_points
from tdhook_train.emergence.emergence_table import emergence_table
from tdhook_train.emergence.half_maximum import HalfMaximum, half_maximum
from tdhook_train.emergence.motion import acceleration, velocity
from tdhook_train.emergence.seeds import Center, Earlier, across_seeds, earlier
from tdhook_train.emergence.sigmoid_onset import SigmoidOnset, sigmoid_onset

__all__ = [
    "Center",
    "ChangePoints",
    "Earlier",
    "HalfMaximum",
    "SigmoidOnset",
    "acceleration",
    "across_seeds",
    "change_points",
    "earlier",
    "emergence_table",
    "half_maximum",
    "sigmoid_onset",
    "velocity",
]
