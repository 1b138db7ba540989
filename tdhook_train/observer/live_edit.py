"""Changes of the network in training itself: asked for, due like a measurement, and recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_train.edit import Edit, Rewrite, Rewritten
from tdhook_train.errors import PathError, SettingsError
from tdhook_train.hooks import HookedModel
from tdhook_train.hooks.paths import selectors
from tdhook_train.hooks.unwrap import unwrapped
from tdhook_train.isolation import networks
from tdhook_train.schedule import Trigger
from tdhook_train.undo import Undo

__all__ = ["LiveEdit", "Span", "write"]


@dataclass(frozen=True)
class LiveEdit:
    """A change of the network in training: the one thing here that does not leave the training as it was.

    An :class:`~tdhook_train.edit.Edit` (:class:`~tdhook_train.latent.Ablate`,
    :class:`~tdhook_train.latent.SteeringVectors`) is held for a span: it changes every call of the live network, by
    the loss and by a collector in this process (workers of a multi-process collector have copies, which are not
    changed), for as long as it lasts. The members of an ensemble, and its targets, are calls of one module: they are
    changed together, under the name without a number. What is measured meanwhile is measured without the edit.

    A :class:`~tdhook_train.edit.Rewrite` (:class:`~tdhook_train.health.ReDo`) writes weights once each time it is due,
    from what the observer's first batch shows, and stays. What the optimizer keeps of these weights begins anew.

    With ``torch.compile``: as long as a span lasts everything compiled runs eagerly, and compiled again afterwards,
    without being compiled anew; numbers may then differ in the last bit. A loss that was itself compiled is already
    running when its hook begins a span: this one call goes on compiled and unedited, the span takes hold with the next.
    Weights that are written are those of the compiled model too.

    Args:
        edit: what is changed.
        when: from when on, or when once; each time it is due.
        steps: how many optimizer steps a span lasts; to the end of observing, if None.
    """

    edit: Edit | Rewrite
    when: Trigger
    steps: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.edit, Edit | Rewrite):
            raise SettingsError(f"LiveEdit needs an Edit or a Rewrite, e.g. Ablate(...) or ReDo(), got {self.edit!r}")
        if not isinstance(self.when, Trigger):
            raise SettingsError(f"when={self.when!r} is no trigger; e.g. when=At(1000)")
        if self.steps is not None and (isinstance(self.edit, Rewrite) or self.steps < 1):
            raise SettingsError(f"steps={self.steps}: a span lasts 1 step or more, and weights are written at once")

    def check(self, model: nn.Module) -> None:
        """Refuse, before anything has run, what names no network and no module.

        Raises:
            PathError: layers that match nothing.
            NetworkError: ``networks=`` names none.
        """
        if isinstance(self.edit, Edit):
            self._live(model)

    def held(self, model: nn.Module, span: Span) -> ExitStack:
        """Change a live model until what is returned is closed.

        Args:
            model: the loss or module in training.
            span: says when the edit is to be left out for a moment.
        """
        taken: set[nn.Module] = set()  # a trunk of two networks is changed once
        with Undo() as undo:
            for hooked, edit in self._live(model):
                edits = edit.edits(hooked)
                undo.enter_context(hooked.edited(edits, off=lambda: span.left_out, but=frozenset(taken)))
                taken |= {module for selector in edits for _, module in hooked.chosen(selector)}
            return undo.pop_all()

    def _live(self, model: nn.Module) -> list[tuple[HookedModel, Edit]]:
        assert isinstance(self.edit, Edit)
        hooked = {name: HookedModel(module, name=name) for name, module in live_modules(model).items()}
        chosen = self.edit.chosen(hooked)
        out = []
        if not hasattr(self.edit, "layers"):
            return [(one, self.edit) for one in chosen.values()]
        layers = selectors(self.edit.layers)
        for one in chosen.values():
            mine = tuple(layer for layer in layers if one.has(layer))
            if mine:
                out.append((one, replace(self.edit, layers=mine)))  # type: ignore[call-arg]
        if not out:
            self.edit.check(chosen)  # says what is the nearest
            raise PathError(f"{self.edit} names no module")
        return out


class Span:
    """An edit while it is held."""

    def __init__(self) -> None:
        self.left_out = False


def live_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name the modules that a training runs: networks without the numbers of members, and without targets."""
    found: dict[str, nn.Module] = {}
    for name, network in networks(model).items():
        if not any(network.module is module for module in found.values()):
            head, _, tail = name.rpartition(".")
            found[head if tail.isdigit() else name] = network.module
    return found


def write(
    model: nn.Module, rewritten: Mapping[str, Mapping[str, Rewritten]], optimizers: Iterable[torch.optim.Optimizer]
) -> None:
    """Write entries of live parameters, and zero what optimizers keep of them.

    Args:
        model: the loss or module in training.
        rewritten: by network, then by the parameter's name in it.
        optimizers: of these parameters; their state of the same shape (moments, momentum) is written as well.
    """
    found = networks(model)
    for name, parameters in rewritten.items():
        live = found[name].weights() if name else TensorDict.from_module(unwrapped(model)[0]).data
        for path, new in parameters.items():
            value = live.get(tuple(path.split(".")))
            with torch.no_grad():
                value[new.where] = new.value.to(value)[new.where]
                for state in _kept_of(value, optimizers):
                    state[new.where] = 0


def _kept_of(value: Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """Return views of optimizer state that stand to their parameter as ``value``, which may be a member's, does."""
    kept = []
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if parameter.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                continue
            begin = value.storage_offset() - parameter.storage_offset()
            if not 0 <= begin < parameter.numel():  # another one in the same piece of memory
                continue
            kept += [
                moment.as_strided(value.shape, value.stride(), begin + moment.storage_offset())
                for moment in state.values()
                if isinstance(moment, Tensor) and moment.shape == parameter.shape
            ]
    return kept
