"""What meets a value at a site, and the proxy that stands for one until the pass has run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tdhook_train.errors import ResolveError, SetterError
from tdhook_train.hooks.agents import one_of, with_one
from tdhook_train.hooks.items import pick, put
from tdhook_train.hooks.members import Members
from tdhook_train.hooks.paths import Site
from tdhook_train.hooks.sequences import end_to_end, in_sequences

__all__ = [
    "COPY",
    "Call",
    "Counted",
    "Keep",
    "Proxy",
    "Steps",
    "Stop",
    "Stopped",
    "Tap",
    "Turn",
    "Unless",
    "Where",
    "in_graph",
    "version_of",
]

Call = int | Literal["all"]
Where = torch.device | torch.dtype | str


class Steps:
    """What the taps of one call of a module share."""

    __slots__ = ("given", "nodes")

    def __init__(self, given: tuple[Any, ...]) -> None:
        self.given = given  # what the module was called with
        self.nodes: dict[int, Any] = {}  # what they have put into the graph, by id of the tensor there


def in_graph(tensor: Tensor) -> Tensor:
    """Copy a floating tensor as a step of the graph, which begins here where nothing before it needs a gradient."""
    if tensor.requires_grad:
        return tensor.clone()
    # not requires_grad_(), which vmap refuses; less a zero, since that leaves -0.0 as it is, and adding one does not
    return tensor.detach() - torch.zeros((), dtype=tensor.dtype, device=tensor.device, requires_grad=True)


class Turn(IntEnum):
    """The order of taps at one value, which a setting begins anew."""

    SET = 0
    DIFFERENTIATE = 1
    READ = 2
    STOP = 3


class Tap(Protocol):
    """Something that meets what a module gives out (or takes in) on its way."""

    @property
    def turn(self) -> Turn:
        """Its place among the taps of one value."""

    def meets(self, value: Any, steps: Steps) -> Any:
        """Return what goes on: the very same object where nothing was changed."""


@dataclass(frozen=True)
class Keep:
    """What of a value is kept: a copy of it as it is at this moment, or of what ``reduce`` makes of it."""

    to: Where | None = None
    reduce: Callable[[Tensor], Tensor] | None = None
    detach: bool = True

    def of(self, value: Tensor, tap: Counted) -> Tensor:
        """Copy a value, at most once; ``tap`` is named in an error.

        Raises:
            SetterError: the reduction changed the value in place, or gave no tensor.
        """
        if torch.is_inference_mode_enabled():  # what is kept is used later, also where gradients are wanted
            with torch.inference_mode(False):
                return self._copy(value, tap)
        return self._copy(value.detach() if self.detach else value, tap)

    def _copy(self, value: Tensor, tap: Counted) -> Tensor:
        if self.reduce is None:
            return value.clone() if self.to is None else value.to(self.to, copy=True)
        version = version_of(value)
        kept = self.reduce(value)
        if not isinstance(kept, Tensor):
            raise SetterError(f"reducing {tap.where}: expected a tensor from reduce, got {type(kept).__name__}")
        if version_of(value) != version:
            raise SetterError(f"reducing {tap.where}: the function changed the value in place; work on a copy")
        kept = kept if self.to is None else kept.to(self.to)
        return kept.clone() if kept.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() else kept


COPY = Keep()


@dataclass
class Counted:
    """A tap at one of its module's calls, or at all of them."""

    turn: ClassVar[Turn] = Turn.READ

    site: Site
    what: str = "output"  # "output", "input" or "gradient"
    call: Call = 0
    batch: tuple[int, ...] = ()  # size of the pass's batch
    sequences: tuple[int, ...] | None = None  # that of the same batch, where its rows came laid end to end
    calls: int = 0
    again: bool = False  # the forward pass is over; a module that still runs is computed again (checkpointing)

    def takes(self) -> bool:
        """Count one call of the module and say whether this is the call that was asked for."""
        if self.again:
            return self._takes_again()
        self.calls += 1
        return self.call == self.calls - 1 or self.call == "all"

    def _takes_again(self) -> bool:
        return False  # it was met the first time

    @property
    def reached(self) -> bool:
        """Whether the call that was asked for took place."""
        return self.calls > 0 if self.call == "all" else 0 <= self.call < self.calls

    @property
    def where(self) -> str:
        """Say what is tapped, for error messages."""
        return f"the {self.what} of {str(self.site)!r}"


@dataclass
class Proxy(Counted):
    """A value of a pass: resolved after the pass has run, an error before."""

    keep: Keep = COPY
    feeds: bool = False  # whether something later in the pass takes the value, graph and all
    done: bool = False
    found: list[Tensor] = field(default_factory=list, repr=False)
    live: list[Tensor] = field(default_factory=list)  # values with their graph, dropped when the pass ends

    def resolve(self) -> Any:
        """Return the value; with ``call="all"`` the list of values, one a call.

        Raises:
            ResolveError: the pass has not run yet, or never reached the site.
        """
        if self.found and self.call != "all":
            return self.found[0]
        if not self.done:
            raise ResolveError(
                f"{self.where} does not exist yet: the pass runs when its `with` block ends; call resolve() after it"
            )
        if self.call == "all" and self.found:
            return list(self.found)
        raise ResolveError(f"{self.where}{self._why_absent()}")

    def _why_absent(self) -> str:
        ran = f"ran {self.calls} time(s)" if self.calls else "never ran in this pass"
        return f", call {self.call}: its module {ran}"

    def meets(self, value: Any, steps: Steps) -> Any:
        """Keep the value; where its graph is kept too, what goes on is a copy that nothing later can write to."""
        if not self.takes():
            return value
        tensor = value if isinstance(value, Tensor) and not self.site.items else pick(value, self.site)
        if self.keep is COPY and not (self.feeds or torch.is_inference_mode_enabled() or Members.are_in(tensor)):
            # as below, without the steps that would do nothing
            self.found.append(end_to_end(one_of(tensor, self.site, self.batch).detach().clone(), self.sequences))
            return value
        members = Members.of(tensor, self.batch)
        whole = tensor if members is None else members.seen(members.raw)
        mine = one_of(whole, self.site, self.batch)
        seen = end_to_end(mine, self.sequences)
        if self.feeds:
            self.live.append(replace(self.keep, detach=False).of(seen, self))
        if self.keep.detach or not tensor.is_floating_point():
            self.found.append(self.keep.of(seen, self))
            return value
        root = in_graph(seen)
        self.found.append(root if self.keep == Keep(detach=False) else self.keep.of(root, self))
        onward = with_one(whole, in_sequences(root.clone(), self.sequences, mine.shape), self.site, self.batch)
        return put(value, self.site.items, onward if members is None else members.hidden(onward), steps.given)

    def finish(self) -> None:
        """Let go of what only the pass needed."""
        self.done = True
        self.live.clear()


@dataclass
class Unless:
    """A tap that lets a value pass as it is, the very same object, for as long as ``off`` says so."""

    tap: Tap
    off: Callable[[], bool]

    @property
    def turn(self) -> Turn:
        """That of the tap."""
        return self.tap.turn

    def meets(self, value: Any, steps: Steps) -> Any:
        """Let it meet the tap."""
        return value if self.off() else self.tap.meets(value, steps)


class Stopped(BaseException):  # a model that catches every Exception must not catch this one
    """Raised inside the model by :class:`Stop`, caught by the run."""


class Stop(Counted):
    """The end of the pass."""

    turn = Turn.STOP

    def meets(self, value: Any, steps: Steps) -> Any:  # noqa: ARG002 - as every tap
        """End the pass here, at the call that was asked for."""
        if self.takes():
            raise Stopped
        return value


def version_of(value: Tensor) -> int:
    """Count what was written to a value in place."""
    return 0 if value.is_inference() else value._version  # inference tensors count none
