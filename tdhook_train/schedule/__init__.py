"""When to measure: clocks, triggers and a budget."""

from tdhook_train.schedule.budget import Budget
from tdhook_train.schedule.clock import Clock, Times
from tdhook_train.schedule.triggers import At, Every, Geometric, Trigger
from tdhook_train.schedule.when import When

__all__ = ["At", "Budget", "Clock", "Every", "Geometric", "Times", "Trigger", "When"]
