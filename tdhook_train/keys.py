"""Keys of a TensorDict, and features of one, as text and as tuples."""

from __future__ import annotations

from typing import Any

from tensordict import NestedKey, TensorDictBase

from tdhook_train.errors import SettingsError

__all__ = ["by_name", "dotted", "path_of", "split_key"]


def split_key(key: Any) -> tuple[str | tuple[str, ...], tuple[int, ...]]:
    """Split ``("observation", 5)`` into a TensorDict key and feature indices."""
    if isinstance(key, str):
        return key, ()
    parts = key if isinstance(key, tuple) else ()
    names = tuple(part for part in parts if isinstance(part, str))
    features = tuple(part for part in parts if isinstance(part, int))
    if not names or names + features != key:
        raise SettingsError(f"{key!r} is no key: names first, then feature indices, e.g. ('observation', 5)")
    return (names[0] if len(names) == 1 else names), features


def path_of(key: NestedKey) -> tuple[str, ...]:
    """Write a key as a tuple of names."""
    return (key,) if isinstance(key, str) else tuple(key)


def dotted(key: NestedKey) -> str:
    """Write a key as one name."""
    return ".".join(path_of(key))


def by_name(td: TensorDictBase) -> dict[str, NestedKey]:
    """Return the keys of every tensor in a TensorDict, each under its one name."""
    return {dotted(key): key for key in td.keys(include_nested=True, leaves_only=True)}
