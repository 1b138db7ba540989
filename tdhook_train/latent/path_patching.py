"""What layers do by way of some others alone: patching that stops everywhere but on the way to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_train.errors import NetworkError
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.hooks.paths import Selector, is_leaf, selectors
from tdhook_train.hooks.run import Run
from tdhook_train.hooks.tap import Proxy
from tdhook_train.hooks.versions import agrees, run_together
from tdhook_train.latent.paired import Changes, Paired, States
from tdhook_train.method import Seen

__all__ = ["PathPatching", "mixes"]


def mixes(module: nn.Module) -> bool:
    """Whether a module holds no other and has a matrix of weights: a projection, a convolution, an embedding."""
    return is_leaf(module) and any(weight.ndim > 1 for weight in module.parameters())


@dataclass(frozen=True)
class PathPatching(Paired):
    """How much an output changes by way of some modules alone when parts of a layer take their value in a paired state.

    Two steps, both exact. In the base state, a part of the sender takes its value in the paired state, while what the
    ``frozen`` modules give out is held, so that the change arrives only by ways on which none of them lies: through
    residual sums, norms and activations. What the receivers take in then, they are given in the base state, where
    everything after them runs.

    For each sender one pass over the base and two for all parts in one batch.

    Args:
        layers: the senders; see :class:`.paired.Paired`, as are ``targets``, ``pairs``, ``side``, ``parts``,
            ``heads``, ``by``, ``way`` and ``max_bytes``.
        receivers: modules by whose first argument the effect goes, such as ``"h.*.attn.q_proj"`` or
            ``"h.3.attn:mask"`` for another argument; None for the outputs of the network themselves. The direct
            effect on what a last layer reads off goes by way of that layer: name it.
        frozen: modules whose outputs are held on the way from sender to receivers, but for the sender, what it lies in
            and what lies in it; the receivers' too. By default those with a matrix of weights. ``()`` holds none:
            the effect by way of the receivers, however it gets there. A module with a residual sum inside it holds up
            the sum as well.

    Writes:
        ``effect`` [layer, target], ``unit_effect`` [layer, unit, target], and so on: mean over pairs of the size of
        the change, in units of the target. With paired states ``normalised``, ``unit_normalised``, …, and ``gap``
        [layer, target], as :class:`ActivationPatching` writes them: the part of the whole gap that goes by this way.

    Raises:
        NetworkError: rows of the network depend on one another.

    Source: Wang et al. 2022, arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969.
    """

    _: KW_ONLY
    receivers: Selection | None = None
    frozen: Selection = mixes

    selections: ClassVar[tuple[str, ...]] = ("layers", "receivers", "frozen")

    def concerns(self, model: HookedModel) -> bool:
        """Whether this network has senders and receivers."""
        return super().concerns(model) and (self.receivers is None or bool(self._receivers(model)))

    def changes(self, states: States, model: HookedModel, seen: Seen) -> Changes:  # noqa: ARG002 - the same whatever is seen
        """Patch every part of every sender."""
        return {site: self.every_part(states, model, site) for site in states.before}

    def outputs(self, states: States, model: HookedModel, site: str, versions: Tensor) -> TensorDict:
        """Return what the network gives out where the receivers take in what versions of one sender make of it."""
        count, axis = len(versions), self.row_axis(model, site)
        sent = versions.movedim(0, axis).flatten(axis, axis + 1)
        held, arrived = self._held(states, model, site), dict[Selector, Proxy]()

        def send(run: Run) -> None:
            (run.set if self.side == "output" else run.set_input)(site, sent)
            for other, values in held.items():
                run.set(other, _in_turn(values, count, model.row_axis(other)), call="all")
            arrived.update({one: run.get_input(one, call="all") for one in self._receivers(model)})

        def receive(run: Run) -> None:
            for one, proxy in arrived.items():
                found = proxy.resolve()
                for other, values in found.items() if isinstance(found, dict) else [(one, found)]:
                    run.set_input(other, _in_turn(values), call="all")

        found = run_together(model, states.base, count, send)
        if self.receivers is not None:
            found = run_together(model, states.base, count, receive)
        if not agrees(found[: len(states.base)], states.outputs):  # of the version in which nothing is replaced
            raise NetworkError(f"PathPatching runs many versions of a batch at once; rows of {model.title} mix")
        return found

    def _receivers(self, model: HookedModel) -> list[Selector]:
        return [] if self.receivers is None else [one for one in selectors(self.receivers) if model.has(one)]

    def _held(self, states: States, model: HookedModel, site: str) -> dict[str, list[Tensor]]:
        """Return what the frozen modules give out at the base, call by call."""
        sender = model.module_of(site)
        inside = set(sender.modules())
        modules = {other: model.module_of(other) for other in model.sites(self.frozen)}
        wanted = [one for one, module in modules.items() if module not in inside and sender not in module.modules()]
        with model.run(states.base) as run:
            proxies = {other: run.get(other, call="all") for other in wanted}
        return {other: proxy.resolve() for other, proxy in proxies.items()}


def _in_turn(values: Sequence[Tensor], count: int = 1, axis: int = 0) -> Callable[[Tensor], Tensor]:
    """Give one value a call, for every version of the rows where the module gives out rows."""
    calls = iter(values)

    def value(before: Tensor) -> Tensor:
        given = next(calls)
        return given if given.shape == before.shape else torch.cat([given] * count, axis)

    return value
