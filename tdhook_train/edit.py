"""Methods that change a model: what it computes, or its weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.hooks import HookedModel
from tdhook_train.method import Method, Seen

__all__ = ["Edit", "Rewrite", "Rewritten"]


@dataclass(frozen=True)
class Edit(Method):
    """A method that changes what a model computes as long as it is prepared, and measures nothing."""

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:  # noqa: ARG002 - there is nothing to measure
        """Add nothing: the outputs of the changed model are there already."""
        return TensorDict({}, batch_size=[])


@dataclass(frozen=True)
class Rewritten:
    """Some entries of a parameter, written anew.

    Args:
        value: of the parameter's shape.
        where: which entries are written; what an optimizer keeps of these begins anew.
    """

    value: Tensor
    where: Tensor


@dataclass(frozen=True)
class Rewrite(Method):
    """A method that writes weights anew, once.

    Measured, by hand or by an observer, it says what it would write and changes nothing. In a training it writes as
    ``Observer(edits={"name": LiveEdit(method, when=...)})``.
    """

    @abstractmethod
    def rewritten(self, seen: Seen, model: HookedModel) -> Mapping[str, Rewritten]:
        """Return what is to be written, by the parameter's name; what is drawn comes from ``seen.generator``."""
