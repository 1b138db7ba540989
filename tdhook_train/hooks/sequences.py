"""Networks that handle time: run on whole sequences, given and giving rows laid end to end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdhook_train.errors import NetworkError

__all__ = ["end_to_end", "in_sequences", "refuse_part"]

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
