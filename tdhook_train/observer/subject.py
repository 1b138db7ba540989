"""What is observed: the isolated networks of a model, and the same networks at initialisation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import nn

from tdhook_train.errors import NetworkError, SchemaError
from tdhook_train.hooks import HookedModel
from tdhook_train.hooks.sequences import handles_time
from tdhook_train.isolation import CopiesView, View, accompanied, draws, is_loss, isolated, private_copy, take_over
from tdhook_train.method import look
from tdhook_train.ops.files import whole_file
from tdhook_train.ops.fingerprint import fingerprint

__all__ = ["Subject", "keys_beside"]


class Subject:
    """A model under observation.

    Args:
        model: a TorchRL loss, whose networks are observed through private copies, or any module, observed in place.
        in_keys: of a plain module: see :class:`~tdhook_train.hooks.HookedModel`.
        out_keys: likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        in_keys: Sequence[NestedKey] | Mapping[Any, str] | None = None,
        out_keys: list[str] | None = None,
    ) -> None:
        self.model = model
        self._asked = {"in_keys": in_keys, "out_keys": out_keys}
        self.is_loss = is_loss(model)
        self.view: View = isolated(model)
        self.networks = {
            name: HookedModel(module, in_keys or self.view.in_keys.get(name), out_keys, name=name)
            for name, module in self.view.modules.items()
        }
        self.initial: dict[str, HookedModel] = {}
        self._draws: dict[str, bool] = {}  # whether a network draws, as far as it was asked
        self._over_time: dict[tuple[str, tuple[int, ...]], bool] = {}  # whether a network handles time in a batch

    @property
    def keys(self) -> dict[str, tuple[list[Any], list[Any]]]:
        """What each network reads and gives out."""
        return {name: (hooked.in_keys, hooked.out_keys) for name, hooked in self.networks.items()}

    def open(self, seed: int, batch: TensorDictBase) -> AbstractContextManager[None]:
        """Open the view for a measurement on a batch.

        What networks draw follows from ``seed``: the process's generators are seeded, and put back. Where no network
        draws and other threads run, such as a collector's, the generators are left to those.
        """
        return self.view.open(None if accompanied() and not self._any_draws(batch) else seed)

    def _any_draws(self, batch: TensorDictBase) -> bool:
        if not self._draws.keys() >= self.networks.keys():
            with self.view.open(None):
                for name, hooked in self.networks.items():
                    self._draws[name] = draws(partial(look, hooked, batch.to(hooked.device()), ()))
        return any(self._draws.values())

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: private copies of the networks, which hold what :meth:`take` gave them."""
        copies = {name: private_copy(hooked.module) for name, hooked in self.networks.items()}
        networks = {name: hooked.on(copies[name]) for name, hooked in self.networks.items()}
        return vars(self) | {"model": None, "view": CopiesView(copies), "networks": networks}

    def weights(self) -> dict[str, TensorDictBase]:
        """Return the weights and buffers that the networks hold now (inside ``view.open``), not copied."""
        return {name: _weights(hooked.module) for name, hooked in self.networks.items()}

    def take(self, weights: Mapping[str, TensorDictBase]) -> None:
        """Give private copies in another process the weights and buffers to be measured with."""
        for name, hooked in self.networks.items():
            take_over(hooked.module, weights[name])

    def remember_initial(self) -> None:
        """Take the present weights as those of the network at initialisation."""
        try:
            with self.view.open(None if accompanied() else 0):
                copies = {name: private_copy(hooked.module) for name, hooked in self.networks.items()}
        except NetworkError as error:
            warnings.warn(f"no baseline at initialisation: {error}", stacklevel=2)
            return
        self.initial = {name: self.networks[name].on(copy) for name, copy in copies.items()}

    def convert_initial(self) -> None:
        """Let the network at initialisation follow the dtype and device of the present one."""
        for name, hooked in self.initial.items():
            take_over(hooked.module, _weights(self.networks[name].module), values=False)

    def save_initial(self, path: Path) -> None:
        """Write the weights at initialisation to one file, and beside it which keys a plain module was given."""
        with whole_file(path) as partial:
            torch.save({name: _weights(hooked.module).to_dict() for name, hooked in self.initial.items()}, partial)
        if any(self._asked.values()):
            with whole_file(keys_beside(path)) as partial:
                torch.save(self._asked, partial)

    def load_initial(self, path: Path) -> None:
        """Read the weights at initialisation of an earlier attempt."""
        self.remember_initial()
        stored = torch.load(path, weights_only=True)
        if set(stored) != set(self.initial):
            raise SchemaError(f"{path} holds networks {sorted(stored)}, the model has {sorted(self.initial)}")
        for name, hooked in self.initial.items():
            _weights(hooked.module).update_(TensorDict(stored[name]))

    def arrange(self, name: str, batch: TensorDictBase, shape: tuple[int, ...]) -> None:
        """Let a network that handles time run on the sequences that the rows of a batch came in.

        Laid end to end they would be one sequence to it. One pass on the rows and one on the sequences, the first time.

        Args:
            name: of the network.
            batch: ``[rows]``.
            shape: of the batch they came in, ``[sequences, time]``.
        """
        if len(shape) > 1 and (name, shape) not in self._over_time:
            self._over_time[name, shape] = handles_time(self.networks[name], batch, shape)
        for hooked in (self.networks[name], self.initial.get(name)):
            if hooked is not None:
                hooked.sequences = shape if self._over_time.get((name, shape)) else None

    def fingerprint(self) -> int:
        """Hash the weights and buffers that the networks hold now (inside ``view.open``)."""
        return fingerprint(TensorDict({name or "model": held for name, held in self.weights().items()}))


def keys_beside(path: Path) -> Path:
    """Say where the keys of a plain module lie, beside its weights at initialisation."""
    return path.with_name("keys.pt")


def _weights(module: nn.Module) -> TensorDictBase:
    return TensorDict.from_module(module).data
