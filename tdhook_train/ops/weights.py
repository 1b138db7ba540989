"""Weights that come from elsewhere: as settings that compare, and fitted to a network."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_train.errors import SettingsError, did_you_mean
from tdhook_train.ops.fingerprint import fingerprint

__all__ = ["Weights"]


class Weights:
    """A state dict, in a file or in memory, of one network or of several by name; equal where its content is.

    Args:
        given: a path, or a mapping of names to tensors or to further mappings. Tensors are copied: those of a state
            dict are the live ones. Of a checkpoint of Lightning, what it holds as ``state_dict`` is taken.

    Raises:
        SettingsError: something else, or it holds no tensor.
    """

    def __init__(self, given: Any) -> None:
        self.path = os.fspath(given) if isinstance(given, str | os.PathLike) else ""
        self._held: dict[str, Tensor] = {}
        self._content = 0
        if self.path:
            return
        if isinstance(given, Mapping | TensorDictBase):
            self._held = {name: value.detach().clone() for name, value in _flat(_inside(given))}
        if not self._held:
            raise SettingsError(
                f"reference= needs the path of a state dict, or a mapping of names to tensors; got {given!r}"
            )
        self._content = fingerprint(TensorDict(self._held))

    def __repr__(self) -> str:
        return self.path or f"{len(self._held)} tensors, {self._content % 2**64:016x}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weights) and (self.path, self._content) == (other.path, other._content)

    def __hash__(self) -> int:
        return hash((self.path, self._content))

    def put_into(self, module: nn.Module, name: str, title: str) -> None:
        """Give a module of one's own these weights.

        Args:
            module: it keeps its dtype and device.
            name: of the network, by which its weights are found where there are those of several.
            title: what errors call it.

        Raises:
            SettingsError: they are not those of such a module.
        """
        module.load_state_dict(self.fitting(module, name, title), strict=False)

    def fitting(self, module: nn.Module, name: str, title: str) -> dict[str, Tensor]:
        """Return those of one network, by the names that they have in it: see :meth:`put_into`."""
        given = self._read()
        inside = {key.removeprefix(f"{name}."): value for key, value in given.items() if key.startswith(f"{name}.")}
        given = inside if name and inside else given
        wanted = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
        spare = dict(module.named_buffers())  # some are no part of a state dict
        for key, value in wanted.items():
            if key not in given:
                raise SettingsError(f"reference= needs {key!r} of {title}, which it has not{did_you_mean(key, given)}")
            if value.shape != given[key].shape:
                shapes = f"{tuple(given[key].shape)}, needs {tuple(value.shape)}"
                raise SettingsError(f"reference= for {title} holds {key!r} of shape {shapes}")
        for key in given:
            if key not in wanted and key not in spare:
                raise SettingsError(f"reference= holds {key!r}, which is none of {title}{did_you_mean(key, wanted)}")
        return {key: given[key] for key in wanted}

    def _read(self) -> dict[str, Tensor]:
        if not self.path:
            return self._held
        if not Path(self.path).is_file():
            raise SettingsError(f"reference={self.path!r} needs to be a file, and is none")
        try:
            given = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # of whatever kind: it depends on what the file is
            said = f"is no file of torch.save() that holds tensors and plain values alone ({type(error).__name__})"
            raise SettingsError(f"reference={self.path!r} {said}") from error
        held = dict(_flat(_inside(given))) if isinstance(given, Mapping | TensorDictBase) else {}
        if not held:
            raise SettingsError(
                f"reference={self.path!r} holds a {type(given).__name__} without tensors by name; wanted is the file "
                "of a state dict, or a checkpoint of Lightning"
            )
        return held


def _inside(given: Any) -> Any:
    held = given.get("state_dict", None)
    return held if isinstance(held, Mapping | TensorDictBase) else given


def _flat(given: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in given.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping | TensorDictBase):
            yield from _flat(value, f"{prefix}{key}.")
