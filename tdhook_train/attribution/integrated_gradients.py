"""What each input feature contributes to an output, along the straight path from a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tdhook_train.explain import Compared, Found, Problem
from tdhook_train.explain.integrated import Integrated

__all__ = ["IntegratedGradients"]


@dataclass(frozen=True)
class IntegratedGradients(Integrated, Compared):
    """How much each input feature contributes to an output, compared with a baseline.

    The contributions of all features sum to ``F(x) - F(baseline)`` up to the error of the quadrature, which is
    reported as ``delta``. All targets come from one forward pass over the path; each costs a backward pass.

    Args:
        targets: see :class:`Attribution`, as are ``init_attr_targets``, ``rows``, ``layers``, ``side``, ``reduction``
            and ``max_bytes``.
        baseline: see :class:`Compared`, as is ``references``.
        points: see :class:`Integrated`, as are ``quadrature`` and ``rows_per_pass``.

    Writes:
        ``("attr", key)`` [batch, target, *feature] for each floating input key, or layer, in units of the target.
        ``delta`` [batch, target]: sum of the attributions less ``F(x) - F(baseline)``; of layers ``("delta", path)``.

    Source: Sundararajan et al. 2017, arXiv:1703.01365.
    """

    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature", "delta": "batch target"}

    def explain(self, problem: Problem) -> Found:
        """Integrate the gradients of every target over the path."""
        return self.contributions(problem)
