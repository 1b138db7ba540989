"""Weights of a checkpoint, put into a model that was built for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tdhook_train.errors import CheckpointError, did_you_mean

__all__ = ["fit"]

_SHOWN = 3  # names in a message


def fit(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Give a model the weights of a checkpoint; it takes their dtype.

    Where the model is a part of what was saved (``model.`` of a LightningModule, ``_orig_mod.`` of a compiled one),
    that part is taken.

    Args:
        model: of one's own.
        state: tensors by name.
        path: what errors call the checkpoint.

    Raises:
        CheckpointError: they are none of such a model.
    """
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = _part_of(state, wanted)
    _refuse_others(wanted, given, model, path)
    dtypes = {value.dtype for value in given.values() if isinstance(value, Tensor) and value.is_floating_point()}
    if len(dtypes) == 1 and dtypes != {value.dtype for value in wanted.values() if value.is_floating_point()}:
        model.to(next(iter(dtypes)))
    model.load_state_dict(given, strict=False)


def _part_of(state: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the entries of the part that has the wanted names, by these names."""
    plain = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    for given in (dict(state), plain):
        if wanted.keys() <= given.keys():
            return given
    first = next(iter(wanted), "")
    for name in plain:
        prefix = name.removesuffix(first)
        if name.endswith(f".{first}") and all(f"{prefix}{key}" in plain for key in wanted):
            return {key: plain[f"{prefix}{key}"] for key in wanted}
    return dict(state)


def _refuse_others(wanted: Mapping[str, Tensor], given: Mapping[str, Any], model: nn.Module, path: Path) -> None:
    title = type(model).__name__
    if missing := [name for name in wanted if name not in given]:
        near = did_you_mean(missing[0], given)
        raise CheckpointError(f"{path} lacks {_some(missing)} of the {title} that was built{near}")
    spare = {name for name, value in given.items() if isinstance(value, Tensor)} - wanted.keys()
    if left := sorted(spare - dict(model.named_buffers()).keys()):  # some buffers are no part of a state dict
        raise CheckpointError(f"{path} also holds {_some(left)}, which the {title} that was built has not")
    for name, value in wanted.items():
        if given[name].shape != value.shape:
            shapes = f"{tuple(given[name].shape)}, which is {tuple(value.shape)}"
            raise CheckpointError(f"{path} holds {name!r} of shape {shapes} in the {title} that was built")


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
