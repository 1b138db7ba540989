"""Targets as functions of outputs and batch, one number a row, that pickle, and say what they read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torch.nn import functional as F

from tdhook_train.errors import SettingsError, TargetError
from tdhook_train.keys import dotted, split_key
from tdhook_train.ops.targets import read

__all__ = ["Kl", "LogProb", "LogitDifference", "LogitGap", "NegativeLoss", "NormalLogProb", "TanhNormalLogProb"]

_EDGE = 1e-6


class _Objective(ABC):
    """A target: callable on a TensorDict of outputs and of what the batch holds."""

    reads: ClassVar[tuple[str, ...]]
    """Settings that are keys of outputs."""

    holds: ClassVar[tuple[str, ...]] = ()
    """Settings that are keys of the batch, and stay as they are there whatever the network gives out."""

    def __post_init__(self) -> None:
        for name in (*self.reads, *self.holds):
            given = getattr(self, name)
            if isinstance(given, list):
                object.__setattr__(self, name, given := tuple(given))
            if not isinstance(given, int) and split_key(given)[1]:
                raise SettingsError(f"{type(self).__name__} needs {name} as a key, got {given!r}")

    @property
    def outputs(self) -> tuple[NestedKey, ...]:
        """Which outputs are read: a network without them has no such target."""
        return tuple(getattr(self, name) for name in self.reads)

    @property
    def held(self) -> tuple[NestedKey, ...]:
        """What is read of the batch."""
        return tuple(key for key in self._held if not isinstance(key, int))

    @property
    def label(self) -> str:
        """A name for axes and tables."""
        shown = [str(key) if isinstance(key, int) else dotted(key) for key in self._held]
        return f"{_snake(type(self).__name__)}({', '.join(shown)})"

    @property
    def _held(self) -> list[Any]:
        return [getattr(self, name) for name in self.holds]

    @abstractmethod
    def __call__(self, td: TensorDictBase) -> Tensor:
        """Return the number of each row."""


@dataclass(frozen=True)
class LogProb(_Objective):
    """The log probability of a discrete action: ``log π(a|s)``.

    Args:
        action: key of the batch with the number of each row's action, or with ones at it (one-hot). Where the network
            gives out an action itself, that of the row as it is, held.
        logits: key of the output, ``[row, action]``, up to a constant of each row.
    """

    action: NestedKey = "action"
    logits: NestedKey = "logits"

    reads: ClassVar[tuple[str, ...]] = ("logits",)
    holds: ClassVar[tuple[str, ...]] = ("action",)

    def __call__(self, td: TensorDictBase) -> Tensor:
        """Return it for each row."""
        return _chosen(read(td, self.logits).log_softmax(-1), read(td, self.action), self.action)


@dataclass(frozen=True)
class NormalLogProb(_Objective):
    """The log density of a continuous action under independent normals.

    Args:
        action: key of the batch, ``[row, dimension]``; where the network gives out an action itself, that of the row as
            it is, held.
        loc: key of the output with their means.
        scale: key of the output with their standard deviations.
    """

    action: NestedKey = "action"
    loc: NestedKey = "loc"
    scale: NestedKey = "scale"

    reads: ClassVar[tuple[str, ...]] = ("loc", "scale")
    holds: ClassVar[tuple[str, ...]] = ("action",)

    def __call__(self, td: TensorDictBase) -> Tensor:
        """Return it for each row."""
        return self._density(read(td, self.action).detach(), td).sum(-1)

    def _density(self, action: Tensor, td: TensorDictBase) -> Tensor:
        scale = read(td, self.scale)
        # log N(a; μ, σ) = -((a - μ)/σ)²/2 - log σ - log(2π)/2
        return -((action - read(td, self.loc)) / scale).square() / 2 - scale.log() - math.log(2 * math.pi) / 2


@dataclass(frozen=True)
class TanhNormalLogProb(NormalLogProb):
    """The log density of a continuous action that is the tanh of a normal: between -1 and 1.

    Args:
        action: see :class:`NormalLogProb`, as are ``loc`` and ``scale``. Actions at an end are moved off it by 1e-6.
    """

    def _density(self, action: Tensor, td: TensorDictBase) -> Tensor:
        action = action.clamp(-1 + _EDGE, 1 - _EDGE)
        # a = tanh u: log p(a) = log N(u) - log(1 - a²)
        return super()._density(action.atanh(), td) - torch.log1p(-action.square())


@dataclass(frozen=True)
class LogitDifference(_Objective):
    """How much a network prefers one class to another: the logit of ``a`` less that of ``b``.

    Args:
        a: number of a class, or a key of the batch with one a row.
        b: likewise.
        logits: key of the output, ``[row, class]``.
    """

    a: int | NestedKey
    b: int | NestedKey
    logits: NestedKey = "logits"

    reads: ClassVar[tuple[str, ...]] = ("logits",)
    holds: ClassVar[tuple[str, ...]] = ("a", "b")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a == self.b:
            raise SettingsError(f"LogitDifference needs two classes, got {self.a!r} twice")

    def __call__(self, td: TensorDictBase) -> Tensor:
        """Return it for each row."""
        logits = read(td, self.logits)
        return self._of(logits, self.a, td) - self._of(logits, self.b, td)

    def _of(self, logits: Tensor, number: int | NestedKey, td: TensorDictBase) -> Tensor:
        if not isinstance(number, int):
            return _chosen(logits, read(td, number), number)
        count = logits.shape[-1]
        if not -count <= number < count:
            raise TargetError(f"there are classes 0 to {count - 1}, not {number}")
        return logits[..., number]


@dataclass(frozen=True)
class LogitGap(_Objective):
    """How clearly a network decides for an action: its logit less the largest of the others'; above 0 where it wins.

    Args:
        action: key of the batch with the number of each row's action, or with ones at it, as of :class:`LogProb`.
        logits: key of the output, ``[row, action]``, two or more.
    """

    action: NestedKey = "action"
    logits: NestedKey = "logits"

    reads: ClassVar[tuple[str, ...]] = ("logits",)
    holds: ClassVar[tuple[str, ...]] = ("action",)

    def __call__(self, td: TensorDictBase) -> Tensor:
        """Return it for each row."""
        logits, action = read(td, self.logits), read(td, self.action).detach()
        if logits.shape[-1] < 2:
            raise TargetError(f"{dotted(self.logits)!r} has one action, and LogitGap holds one against others")
        chosen = _chosen(logits, action, self.action)
        number = action.int().argmax(-1) if action.shape == logits.shape else action.view_as(chosen)
        taken = F.one_hot(number.long(), logits.shape[-1]).bool()
        return chosen - logits.masked_fill(taken, -torch.inf).amax(-1)


@dataclass(frozen=True)
class Kl(_Objective):
    """How far a network's distribution over classes is from a reference's: ``Σ p_ref (log p_ref - log p)``.

    Args:
        reference: key of the batch with the logits of the reference.
        logits: key of the output, ``[row, class]``.
    """

    reference: NestedKey = ("reference", "logits")
    logits: NestedKey = "logits"

    reads: ClassVar[tuple[str, ...]] = ("logits",)
    holds: ClassVar[tuple[str, ...]] = ("reference",)

    def __call__(self, td: TensorDictBase) -> Tensor:
        """Return it for each row."""
        known, now = read(td, self.reference).detach().log_softmax(-1), read(td, self.logits).log_softmax(-1)
        return F.kl_div(now, known, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class NegativeLoss(_Objective):
    """How well an output agrees with the truth: less its loss, so that what helps counts positive.

    Args:
        truth: key of the batch: the number of the class (or ones at it), or what should be given out.
        output: key of the output, logits or values.
        loss: cross-entropy of logits, or the squared error, in the mean over features.
    """

    truth: NestedKey = "label"
    output: NestedKey = "logits"
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"

    reads: ClassVar[tuple[str, ...]] = ("output",)
    holds: ClassVar[tuple[str, ...]] = ("truth",)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("cross_entropy", "squared_error")
        if self.loss not in known:
            raise SettingsError(f"NegativeLoss: loss={self.loss!r} is none of {', '.join(map(repr, known))}")

    def __call__(self, td: TensorDictBase) -> Tensor:
        """Return it for each row."""
        output, truth = read(td, self.output), read(td, self.truth)
        if self.loss == "cross_entropy":
            return _chosen(output.log_softmax(-1), truth, self.truth)
        if truth.numel() != output.numel():
            raise TargetError(f"{dotted(self.truth)!r} has {tuple(truth.shape)}, the output {tuple(output.shape)}")
        return -(output - truth.detach().view_as(output)).square().flatten(1).mean(1)


def _chosen(values: Tensor, choice: Tensor, key: NestedKey) -> Tensor:
    """Return the value of each row's choice, by its number or by ones at it: ``[...]`` from ``[..., class]``."""
    choice = choice.detach()
    if choice.shape == values.shape and not choice.is_floating_point():
        return torch.where(choice.bool(), values, 0).sum(-1)
    number = choice if choice.ndim == values.ndim else choice[..., None]
    if number.shape != (*values.shape[:-1], 1) or choice.is_floating_point():
        raise TargetError(
            f"{dotted(key)!r} is {choice.dtype}, {tuple(choice.shape)}; it must number one of {values.shape[-1]} "
            "classes in each row, or have ones at it"
        )
    if number.numel() and not 0 <= int(number.min()) <= int(number.max()) < values.shape[-1]:
        raise TargetError(f"{dotted(key)!r} has classes beyond 0 to {values.shape[-1] - 1}")
    return values.gather(-1, number.long())[..., 0]


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
