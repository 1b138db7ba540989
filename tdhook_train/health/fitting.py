"""Training many private copies of one network at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of
from tdhook_train.ops.targets import Target, read

__all__ = ["Member", "fitted", "outputs_of", "rows_of"]


class Member(nn.Module):
    """A copy of a network as a function from its inputs to one of its outputs, ``[row, feature]``.

    Args:
        model: the network that it is a copy of.
        twin: the copy.
        output: which is read; what runs only after it, such as a distribution that an action is drawn from, is left
            out.
    """

    def __init__(self, model: HookedModel, twin: nn.Module, output: Target) -> None:
        super().__init__()
        self.net = _up_to(twin, output)
        self._hooked, self._output = model.on(self.net), output

    def forward(self, batch: TensorDictBase) -> Tensor:
        """Run the copy."""
        return read(self._hooked.forward(batch), self._output).flatten(1)


def rows_of(model: HookedModel, batch: TensorDictBase, index: Tensor) -> TensorDict:
    """Return copies of a network's inputs at some rows, which may go into a graph; of sequences all of them."""
    given = {key: batch.get(key).clone() for key in model.in_keys}
    if model.sequences is not None:
        return TensorDict(given, batch_size=batch.batch_size)
    return TensorDict({key: value[index.to(value.device)] for key, value in given.items()}, batch_size=[len(index)])


def outputs_of(members: Sequence[Member], batch: TensorDictBase) -> Tensor:
    """Run all members: ``[member, row, feature]``."""
    with torch.no_grad():
        return torch.stack([member(batch) for member in members])


def fitted(members: Sequence[Member], batch: TensorDictBase, targets: Tensor, steps: int, lr: float) -> Tensor:
    """Train every member towards a target of its own by Adam, and return the mean squared errors it ends with.

    All at once where ``torch.func`` can run them so, one after the other in each step where not; Adam and the sum of
    the losses know nothing of members, so that each is trained as if it were alone.

    Args:
        members: of one architecture; they may be changed.
        batch: their inputs.
        targets: ``[member, row, feature]``.
        steps: of Adam.
        lr: its step size.

    Returns:
        ``[member]``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        weights, run = _together(members, batch) or _apart(members, batch)
        optimizer = torch.optim.Adam(weights, lr)
        for _ in range(steps):
            optimizer.zero_grad()
            _errors(run(), targets).sum().backward()
            optimizer.step()
        return _errors(run().detach(), targets)


def _errors(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean((1, 2))


def _together(members: Sequence[Member], batch: TensorDictBase) -> tuple[list[Tensor], Callable[[], Tensor]] | None:
    """Stack the weights; None where the network cannot be run so."""
    try:
        parameters, buffers = stack_module_state(cast(Any, list(members)))
        weights = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}

        def one(own: Any, kept: Any) -> Tensor:
            return functional_call(members[0], (own, kept), (batch,))

        def run() -> Tensor:
            return vmap(one)(weights, buffers)

        run()
    except Exception:  # whatever a network does that cannot be mapped: running it as it is says what is wrong
        return None
    return list(weights.values()), run


def _apart(members: Sequence[Member], batch: TensorDictBase) -> tuple[list[Tensor], Callable[[], Tensor]]:
    weights: list[Tensor] = [weight for member in members for weight in member.requires_grad_(True).parameters()]
    return weights, lambda: torch.stack([member(batch) for member in members])


def _up_to(twin: nn.Module, output: Target) -> nn.Module:
    """Cut a sequence after the last part that gives an output."""
    if not isinstance(twin, TensorDictSequential):
        return twin
    parts = list(twin.module)
    wanted = path_of(output) if isinstance(output, str) else tuple(name for name in output if isinstance(name, str))
    giving = [i for i, part in enumerate(parts) if any(wanted[: len(path_of(k))] == path_of(k) for k in part.out_keys)]
    return TensorDictSequential(*parts[: giving[-1] + 1]) if giving else twin
