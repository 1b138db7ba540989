"""What a module takes in: arguments by place, by name, and the keys of a TensorDict."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from tensordict import is_tensor_collection
from torch import nn

__all__ = ["Arguments"]


class Arguments:
    """The arguments of one call of a module.

    ``0`` is the first argument, however it was given; a name is a keyword, the name of a parameter in the module's
    ``forward``, or a key of a TensorDict that is the first argument.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._module = module
        self.args = args
        self.kwargs = kwargs

    def items(self) -> Iterator[tuple[int | str, Any]]:
        """Yield what was given with its place or keyword."""
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def __getitem__(self, name: int | str) -> Any:
        place = self._place(name)
        if isinstance(place, int):
            return self.args[place]
        return self.kwargs[place] if place in self.kwargs else self._batch()[place]

    def __setitem__(self, name: int | str, value: Any) -> None:
        place = self._place(name)
        if isinstance(place, int):
            args = list(self.args)
            args[place] = value
            self.args = tuple(args)
        elif place in self.kwargs:
            self.kwargs = {**self.kwargs, place: value}
        else:
            batch = self._batch().copy()
            batch[place] = value
            self[0] = batch

    def _place(self, name: int | str) -> int | str:
        if name in self.kwargs or (isinstance(name, int) and name < len(self.args)):
            return name
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(self._module.forward).parameters.values()
        places = [parameter.name for parameter in parameters if parameter.kind in kinds]
        if isinstance(name, int):  # given by keyword: the place is the one in the signature
            given = [place for place in places if place in self.kwargs] or list(self.kwargs)
            return given[0] if name == 0 else places[name]
        place = places.index(name) if name in places else len(self.args)
        return place if place < len(self.args) else name

    def _batch(self) -> Any:
        first = self[0]
        if not is_tensor_collection(first):
            raise KeyError("no such argument")
        return first
