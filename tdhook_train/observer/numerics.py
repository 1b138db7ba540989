"""How torch computes, so that another process computes the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

__all__ = ["Numerics"]


@dataclass(frozen=True)
class Numerics:
    """How torch computes in the process where this is made.

    Args:
        threads: sums over many values come out differently with another number.
        dtype: what torch makes of Python's numbers.
        precision: of float32 products, as torch names it.
        deterministic: whether torch is asked for deterministic algorithms.
        warns: whether it only warns where there is none.
    """

    threads: int = field(default_factory=torch.get_num_threads)
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    precision: str = field(default_factory=torch.get_float32_matmul_precision)
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)
    warns: bool = field(default_factory=torch.is_deterministic_algorithms_warn_only_enabled)

    def apply(self) -> None:
        """Compute like that from now on."""
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.precision)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warns)
