"""Many versions of one activation through the rest of a network, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import TdhookTrainError
from tdhook_train.hooks.model import HookedModel
from tdhook_train.hooks.run import Run

__all__ = ["agrees", "run_together", "run_versions"]


def run_versions(
    model: HookedModel,
    inputs: TensorDictBase,
    site: str,
    versions: Tensor,
    expected: TensorDictBase,
    side: Literal["output", "input"] = "output",
) -> TensorDict:
    """Return the outputs for every version of what ``site`` gives out, or takes in.

    First tried: the versions as a new leading dimension, so that only what lies after the site runs on all of them.
    Where the network cannot take that dimension, or makes something else of it (the unchanged version then does not
    give ``expected``), the whole network runs on every row of every version; where rows depend on one another and
    that does not give ``expected`` either, on one version after another.

    Args:
        model: the network.
        inputs: its inputs, ``[rows]``.
        site: where the versions go.
        versions: ``[version, rows, ...]`` (rows where the site has them), the first of them the unchanged value.
        expected: the outputs of the unchanged network, ``[rows]``.
        side: whether the versions are of what the module gives out, or of its first argument.

    Returns:
        The floating outputs, ``[version * rows]``.
    """
    axis = model.row_axis(site) if side == "output" else 0
    count, rows = len(versions), versions.shape[1 + axis]
    try:
        with model.run(inputs) as run:
            _set(run, side)(site, versions, copies=count)
        ahead = _flat(run.output, model.out_keys, count, rows)
        if agrees(ahead[:rows], expected):
            return ahead
    except TdhookTrainError:
        raise
    except Exception:  # whatever a layer raises that insists on its number of dimensions: run all rows instead
        pass
    flat = versions.movedim(0, axis).flatten(axis, axis + 1)
    together = run_together(model, inputs, count, lambda run: _set(run, side)(site, flat))
    if agrees(together[:rows], expected):
        return together
    alone = []
    for version in versions:
        with model.run(inputs) as run:
            _set(run, side)(site, version)
        alone.append(_flat(run.output, model.out_keys, rows, 0))
    return torch.cat(alone)


def run_together(model: HookedModel, inputs: TensorDictBase, count: int, describe: Callable[[Run], None]) -> TensorDict:
    """Return the outputs of one pass over all rows of every version: floating ones, ``[version * rows]``.

    Args:
        model: the network.
        inputs: its inputs, ``[rows]``.
        count: of versions, ``[version * rows]`` where they go.
        describe: the pass: what is read and set in it.
    """
    rows = len(inputs)
    repeated = TensorDict({key: _repeat(inputs.get(key), count) for key in model.in_keys}, batch_size=[count * rows])
    with model.run(repeated) as run:
        describe(run)
    return _flat(run.output, model.out_keys, count * rows, 0)


def _set(run: Run, side: Literal["output", "input"]) -> Callable[..., None]:
    return run.set if side == "output" else run.set_input


def _repeat(value: Tensor, count: int) -> Tensor:
    return value.repeat(count, *[1] * (value.ndim - 1))


def _flat(outputs: TensorDictBase, keys: list[NestedKey], count: int, rows: int) -> TensorDict:
    """Collect the floating outputs in which every version shows, ``[version * rows]``."""
    lead = (count, rows) if rows else (count,)
    found: dict[NestedKey, Tensor] = {}
    chosen = outputs.select(*keys, strict=False)
    for key, value in chosen.items(include_nested=True, leaves_only=True):
        if value.is_floating_point() and value.shape[: len(lead)] == lead:
            found[key] = value.flatten(0, 1) if rows else value
        elif value.is_floating_point() and rows and value.shape[:1] == (rows,):
            found[key] = _repeat(value, count)  # does not depend on the site
    return TensorDict(found, batch_size=[count * rows if rows else count])


def agrees(found: TensorDict, expected: TensorDictBase) -> bool:
    """Whether the floating outputs are those expected, but for rounding."""
    keys = [k for k, v in expected.items(include_nested=True, leaves_only=True) if v.is_floating_point()]
    return all(
        k in found.keys(include_nested=True)
        and found.get(k).shape == expected.get(k).shape
        and _close(found.get(k), expected.get(k))
        for k in keys
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    # a share of each output's own size: an output of 1e-6 is not close to every other
    share = max(1e-4, 8 * torch.finfo(expected.dtype).eps)
    size = expected.abs().nan_to_num(0, 0, 0).amax(0)
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool((same | ((found - expected).abs() <= share * size)).all())
