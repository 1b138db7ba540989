"""How much of an output is there when the features that carry most of it come first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tdhook_train.explain.curve import Curve

__all__ = ["Insertion"]


@dataclass(frozen=True)
class Insertion(Curve):
    """How fast an output rises when the features with the largest shares are put in first.

    Beside the attribution itself, ``steps`` passes for each target and ``orders`` × ``steps`` for chance.

    Args:
        of: see :class:`Judged`, as is ``reduction``.
        baseline: see :class:`Masked`, as are ``unit``, ``by`` and ``orders``.
        steps: of the curve; after step s, ⌈s/steps⌉ of all units.

    Writes:
        ``auc`` [batch, target]: area under the output over the share of features put in, in units of the target.
        ``normalised``: that of the output relative to its ends, 1 with all features and 0 with none; high is good. NaN
        where the ends are the same; in the mean, rows count by ``rise``, the output less that of the baseline.
        ``chance_auc``, ``chance_normalised``: the mean over random orders. ``curve`` [batch, target, share]. Of layers
        ``("auc", path)`` and so on.

    Source: Petsiuk et al. 2018, arXiv:1806.07421.
    """

    keeps: ClassVar[Literal["first", "others"]] = "first"
