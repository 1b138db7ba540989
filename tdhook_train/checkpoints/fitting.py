"""Weights of a checkpoint, put into a model that was built for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tdhook_train.errors import CheckpointError, did_you_mean

__all__ = ["fit"]

_COMPILED = "_orig_mod."  # in the names of a module that is compiled
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
    held = model.state_dict()
    names = {name.replace(_COMPILED, ""): name for name in held}
    wanted = {short: value for short, name in names.items() if isinstance(value := held[name], Tensor)}
    given = _part_of(state, wanted, path)
    _refuse_others(wanted, given, model, path)
    dtypes = {value.dtype for value in given.values() if isinstance(value, Tensor) and value.is_floating_point()}
    if len(dtypes) == 1 and dtypes != {value.dtype for value in wanted.values() if value.is_floating_point()}:
        model.to(next(iter(dtypes)))
    for short, value in model.state_dict().items():
        if isinstance(value, Tensor) and (dtype := given[short.replace(_COMPILED, "")].dtype) != value.dtype:
            raise CheckpointError(
                f"{path} holds {short!r} of {dtype}, which is {value.dtype} in the {type(model).__name__} that was "
                "built; build it so"
            )
    model.load_state_dict({names.get(short, short): value for short, value in given.items()}, strict=False)


def _part_of(state: Mapping[str, Any], wanted: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the entries of the part that has the wanted names, by these names."""
    plain = {name.replace(_COMPILED, ""): value for name, value in state.items()}
    if wanted.keys() <= plain.keys():
        return plain
    first = next(iter(wanted), "")
    prefixes = [name.removesuffix(first) for name in plain if name.endswith(f".{first}")]
    whole = [prefix for prefix in prefixes if all(f"{prefix}{key}" in plain for key in wanted)]
    fit = [prefix for prefix in whole if all(_alike(plain[f"{prefix}{key}"], value) for key, value in wanted.items())]
    if len(fit) > 1:
        parts = _some([prefix.removesuffix(".") for prefix in fit])
        raise CheckpointError(f"{path} has several parts like what was built: {parts}; build what holds them")
    if prefix := next(iter(fit or whole), ""):
        return {key: plain[f"{prefix}{key}"] for key in wanted}
    return plain


def _alike(value: Any, wanted: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == wanted.shape


def _refuse_others(wanted: Mapping[str, Tensor], given: Mapping[str, Any], model: nn.Module, path: Path) -> None:
    title = type(model).__name__
    if missing := [name for name in wanted if name not in given]:
        near = did_you_mean(missing[0], given)
        raise CheckpointError(f"{path} lacks {_some(missing)} of the {title} that was built{near}")
    spare = {name for name, value in given.items() if isinstance(value, Tensor)} - wanted.keys()
    if left := sorted(spare - {name.replace(_COMPILED, "") for name, _ in model.named_buffers()}):
        # some buffers are no part of a state dict
        raise CheckpointError(f"{path} also holds {_some(left)}, which the {title} that was built has not")
    for name, value in wanted.items():
        if not _alike(given[name], value):
            found = f"of shape {tuple(given[name].shape)}" if isinstance(given[name], Tensor) else "that is no tensor"
            raise CheckpointError(
                f"{path} holds {name!r} {found}, which is {tuple(value.shape)} in the {title} that was built"
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
