"""Methods built from several families: which parts of a network carry a behaviour, and how they work together."""

from tdhook_train.circuits.rel_p import RelP

__all__ = ["RelP"]
