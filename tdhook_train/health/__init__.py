"""Whether a network can still learn: units that do nothing, representations that collapse."""

from tdhook_train.health.dead_units import DeadUnits
from tdhook_train.health.dormant_units import DormantUnits
from tdhook_train.health.effective_rank import EffectiveRank
from tdhook_train.health.redo import ReDo

__all__ = ["DeadUnits", "DormantUnits", "EffectiveRank", "ReDo"]
