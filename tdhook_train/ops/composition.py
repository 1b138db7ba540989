"""How much of what one attention head writes another reads, from the weights alone."""

from __future__ import annotations

from torch import Tensor

__all__ = ["composition"]


def composition(writes: Tensor, reads: Tensor) -> Tensor:
    """Return the composition score of every pair of heads, ``[writer, reader]``, from 0 (nothing) to 1.

    ``‖OV R‖ / (‖OV‖ ‖R‖)`` in Frobenius norms, for a residual stream that is a row vector: first through the writer,
    then into the reader. Heads that write and read in orthogonal subspaces score 0.

    Args:
        writes: ``W_V W_O`` of each writing head, ``[writer, model, model]``.
        reads: of each reading head what meets the stream, ``[reader, model, any]``: ``W_Q`` for composition with
            queries, ``W_K`` with keys, ``W_V W_O`` with values.

    Source: Elhage et al. 2021, "A mathematical framework for transformer circuits".
    """
    together = (writes[:, None] @ reads[None]).flatten(2).norm(dim=2)
    apart = writes.flatten(1).norm(dim=1)[:, None] * reads.flatten(1).norm(dim=1)[None]
    return together / apart
