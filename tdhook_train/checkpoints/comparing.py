"""Whether two runs hold the same evidence, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.keys import dotted

__all__ = ["differences"]

_OWN = ("time", "cost", "attempt", "run")  # what the rows of two runs say of themselves
_SHOWN = 8  # steps or keys in a line

_Given = ArtifactBuffer | str | os.PathLike[str]


def differences(one: _Given, other: _Given) -> list[str]:
    """Compare the rows of two runs, such as one recorded live and a sweep over its checkpoints, bit for bit.

    When a row was measured, in which attempt and at what cost is left out; of several rows of a step the last one
    counts.

    Args:
        one: a run, or its folder.
        other: likewise.

    Returns:
        What differs, a line each; nothing where every row of both is the same.
    """
    with ExitStack() as stack:
        a, b = (
            run if isinstance(run, ArtifactBuffer) else stack.enter_context(ArtifactBuffer.open(run))
            for run in (one, other)
        )
        found = []
        for name in dict.fromkeys([*a, *b]):
            if name in a and name in b:
                found += _of_artifact(a, b, name)
            else:
                found.append(f"{name!r}: only {(a if name in a else b).path} has rows of it")
        return found


def _of_artifact(a: ArtifactBuffer, b: ArtifactBuffer, name: str) -> list[str]:
    steps, others = (set(run[name].steps.tolist()) for run in (a, b))
    found = [
        f"{name!r}: only {run.path} has rows of step {_some(map(str, sorted(own)))}"
        for run, own in ((a, steps - others), (b, others - steps))
        if own
    ]
    unlike = {step: _unlike(a[name].at(step), b[name].at(step)) for step in sorted(steps & others)}
    return [*found, *(f"{name!r}, step {step}: {_some(keys)} differ" for step, keys in unlike.items() if keys)]


def _unlike(one: TensorDictBase, other: TensorDictBase) -> list[str]:
    values, others = ({dotted(key): value for key, value in row.items(True, True)} for row in (one, other))
    own = {f"meta.{key}" for key in _OWN}
    return [
        key
        for key in dict.fromkeys([*values, *others])
        if key not in own and not (key in values and key in others and _same(values[key], others[key]))
    ]


def _same(a: object, b: object) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a == b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().flatten().view(torch.uint8)  # a NaN is unlike itself


def _some(names: Iterable[str]) -> str:
    every = [*names]
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")
