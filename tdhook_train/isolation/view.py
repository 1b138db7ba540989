"""What a measurement may touch: private copies of a loss's networks, or a live module under a guard."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from tensordict import NestedKey
from torch import nn

from tdhook_train.errors import NetworkError
from tdhook_train.isolation.acting import deterministic
from tdhook_train.isolation.in_place import in_place, seeded
from tdhook_train.isolation.networks import is_loss, networks
from tdhook_train.isolation.shadow import Shadow

__all__ = ["CopiesView", "LiveView", "ShadowView", "View", "isolated"]


class View(Protocol):
    """Modules that may be run, hooked and edited while :meth:`open` lasts."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The modules by network name."""

    @property
    def in_keys(self) -> Mapping[str, Sequence[NestedKey]]:
        """What networks read that are no TensorDict modules, as far as the loss says."""

    def open(self, seed: int | None) -> AbstractContextManager[None]:
        """A context in which the modules hold the present weights and nothing done to them is seen outside.

        Random states follow from ``seed`` and are put back; with None they are left alone.
        """


class CopiesView:
    """Modules that nobody else has.

    Args:
        modules: by network name.
        in_keys: what networks read that are no TensorDict modules.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], in_keys: Mapping[str, Sequence[NestedKey]] | None = None
    ) -> None:
        self.modules = modules
        self.in_keys = in_keys or {}

    @contextmanager
    def open(self, seed: int | None) -> Iterator[None]:
        """Let policies act by their mode, and draws follow from ``seed``."""
        with seeded(self.modules.values(), seed), _row_by_row():
            yield


class ShadowView(CopiesView):
    """Private copies of a loss's networks, given the live weights each time they are opened."""

    def __init__(self, loss: nn.Module) -> None:
        found = networks(loss)
        self._shadows = {name: Shadow(network) for name, network in found.items()}
        in_keys = {name: network.in_keys for name, network in found.items() if network.in_keys is not None}
        super().__init__({name: shadow.module for name, shadow in self._shadows.items()}, in_keys)

    @contextmanager
    def open(self, seed: int | None) -> Iterator[None]:
        """Give the copies the present weights as well."""
        with super().open(seed):
            for shadow in self._shadows.values():
                shadow.refresh()
            yield


class LiveView:
    """A live module, measured in place under a guard, for modules that may not be copied."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.in_keys: dict[str, Sequence[NestedKey]] = {}

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The live module, under the empty name."""
        return {"": self._model}

    @contextmanager
    def open(self, seed: int | None) -> Iterator[None]:
        """Evaluation mode, nothing kept: flags, buffers, gradients and random states return to what they were."""
        with in_place(self._model, seed), _row_by_row():
            yield


@contextmanager
def _row_by_row() -> Iterator[None]:
    """Each row is a moment of its own: policies act by their mode, recurrent ones from the hidden state of the row.

    Rows laid end to end would be one long sequence to TorchRL's recurrent modules, were they asked for one: by their
    own setting, or by whoever measures from inside ``set_recurrent_mode``. They are there only if TorchRL is.
    """
    with deterministic():
        if (torchrl := sys.modules.get("torchrl.modules")) is None:
            yield
        else:
            with torchrl.set_recurrent_mode(False):
                yield


def isolated(model: nn.Module) -> ShadowView | LiveView:
    """Choose the isolation that fits: shadows for a TorchRL loss, a guard for any other module."""
    if not isinstance(model, nn.Module):
        raise NetworkError(f"expected a torch module or a TorchRL loss to observe, got {type(model).__name__}")
    return ShadowView(model) if is_loss(model) else LiveView(model)
