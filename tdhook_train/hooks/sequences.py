"""Networks that handle time: run on whole sequences, given and giving rows laid end to end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.errors import NetworkError
from tdhook_train.keys import dotted
from tdhook_train.undo import devices_of, kept_rng

if TYPE_CHECKING:
    from tdhook_train.hooks.model import HookedModel

__all__ = ["end_to_end", "handles_time", "in_sequences", "refuse_part"]

Sequences = tuple[int, ...]  # shape of the batch before its rows were laid end to end


def refuse_part(title: str, sequences: Sequences, rows: int, *, whole: bool) -> None:
    """Refuse a pass over anything but the whole batch, row for row.

    Raises:
        NetworkError: other rows, or copies of rows, which are no sequences.
    """
    if rows != math.prod(sequences) or not whole:
        given = f"{rows} rows" if whole else "copies of rows"
        raise NetworkError(
            f"{title} handles time: it runs on the whole batch {list(sequences)}, and {given} were given. Only what "
            "reads the shared pass can be measured on it; leave it out of other methods with networks=..."
        )


def end_to_end(value: Tensor, sequences: Sequences | None) -> Tensor:
    """Lay a value of the sequences row by row; any other is given as it is.

    Args:
        value: of a pass.
        sequences: the shape of the batch, or None where its rows were given as they are.
    """
    if sequences is None or tuple(value.shape[: len(sequences)]) != sequences:
        return value
    return value.flatten(0, len(sequences) - 1)


def in_sequences(value: Tensor, sequences: Sequences | None, shape: torch.Size) -> Tensor:
    """Undo :func:`end_to_end` for a value that was of this shape; any other is given as it is."""
    if sequences is None or value.shape != (math.prod(sequences), *shape[len(sequences) :]):
        return value
    return value.reshape(shape)


def handles_time(model: HookedModel, rows: TensorDictBase, shape: Sequences) -> bool:
    """Whether a network gives something else for sequences than for their rows one by one, at its end or inside.

    One pass on the rows and one on the sequences.

    Args:
        model: left to take its rows as they are.
        rows: laid end to end.
        shape: of the batch that they came in.
    """
    model.sequences = None
    apart, together = _tried(model, rows), _tried(model, rows.reshape(shape))
    if apart is None or together is None:  # it takes but one of them
        return together is not None
    for name, one in apart.items():
        other = end_to_end(together[name], shape) if name in together else None
        if other is None or one.shape != other.shape or not one.is_floating_point():
            continue
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True):
            return True
    return False


def _tried(model: HookedModel, batch: TensorDictBase) -> dict[str, Tensor] | None:
    """Run a network on a batch and return what its layers and the network give out; None where it takes no such."""
    with torch.no_grad(), kept_rng(devices_of(model.module.modules())):
        try:
            model.trace(batch)
            with model.run(batch) as run:
                values = {site: run.get(site) for site in model.sites("**")}
        except (RuntimeError, ValueError, IndexError):
            return None
    outputs = run.output
    given = {f"output {dotted(key)}": outputs.get(key) for key in model.out_keys if key in outputs.keys(True)}
    found = {site: value.resolve() for site, value in values.items()}
    return found | {key: value for key, value in given.items() if isinstance(value, Tensor)}
