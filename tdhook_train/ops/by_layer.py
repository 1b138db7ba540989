"""Numbers for layers, as settings hold them: plain tuples, which compare, hash and pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tdhook_train.errors import SettingsError, did_you_mean

__all__ = ["as_numbers", "by_layer", "of_layer", "settled"]


def as_numbers(given: Any) -> Any:
    """Bring a tensor, an array or lists in lists to tuples of floats.

    Raises:
        SettingsError: something in it is no finite number.
    """
    try:
        tensor = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(f"numbers, one for each unit, are what a layer needs; got {given!r}") from error
    if not tensor.isfinite().all():
        raise SettingsError(
            "a layer needs finite numbers; where nothing was found there are none, and `reason` says why"
        )
    return _tuples(tensor.tolist())


def by_layer(given: Any) -> dict[str | None, Any]:
    """Return the numbers of each layer, or those of all under None.

    Args:
        given: numbers for all layers; a mapping or a TensorDict of these by layer; or what :func:`settled` returned.
    """
    if isinstance(given, tuple) and given and isinstance(given[0], tuple) and isinstance(given[0][0], str):
        given = dict(given)
    if isinstance(given, Mapping) or (hasattr(given, "items") and not isinstance(given, Tensor)):
        return {str(layer): as_numbers(numbers) for layer, numbers in given.items()}
    return {None: as_numbers(given)}


def settled(numbers: Mapping[str | None, Any]) -> tuple[Any, ...]:
    """Return the numbers as a setting holds them; :func:`by_layer` takes them back."""
    return numbers[None] if None in numbers else tuple(numbers.items())


def of_layer(numbers: Mapping[str | None, Any], site: str, network: str) -> Any:
    """Return what a layer is given, under its path or that and the network's name.

    Raises:
        SettingsError: nothing; names the nearest layers.
    """
    for name in (f"{network}.{site}", site, None):
        if name in numbers:
            return numbers[name]
    raise SettingsError(f"{site!r} needs numbers of its own{did_you_mean(site, [str(name) for name in numbers])}")


def _tuples(given: Any) -> Any:
    return tuple(_tuples(one) for one in given) if isinstance(given, list) else given
