"""Sides that take turns in one process, in an order drawn anew each round."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

__all__ = ["ratio", "turns"]


def turns(every: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each side, round by round, after one round that fills caches."""
    seconds: dict[str, list[float]] = {name: [] for name in every}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(every), len(every)):
            gc.collect()
            began = time.perf_counter()
            every[name]()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], side: str, to: str) -> float:
    """Return the median over rounds of one side's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[side], seconds[to], strict=True))
