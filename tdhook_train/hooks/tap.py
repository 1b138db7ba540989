"""What is read, set or stopped at a site, and the proxy that stands for a value until the pass has run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tdhook_train.errors import ResolveError, SetterError
from tdhook_train.hooks.agents import Surroundings, agent_of, one_of, with_one
from tdhook_train.hooks.items import pick, put
from tdhook_train.hooks.members import Members
from tdhook_train.hooks.paths import Site
from tdhook_train.hooks.sequences import end_to_end, in_sequences

__all__ = [
    "COPY",
    "Call",
    "Keep",
    "Proxy",
    "Setter",
    "Steps",
    "Stop",
    "Stopped",
    "Tap",
    "Turn",
    "Unless",
    "Where",
    "in_graph",
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

    def of(self, value: Tensor, tap: _Counted) -> Tensor:
        """Copy a value, at most once; ``tap`` is named in an error.

        Raises:
            SetterError: the reduction changed the value in place, or gave no tensor.
        """
        if torch.is_inference_mode_enabled():  # what is kept is used later, also where gradients are wanted
            with torch.inference_mode(False):
                return self._copy(value, tap)
        return self._copy(value.detach() if self.detach else value, tap)

    def _copy(self, value: Tensor, tap: _Counted) -> Tensor:
        if self.reduce is None:
            return value.clone() if self.to is None else value.to(self.to, copy=True)
        version = _version(value)
        kept = self.reduce(value)
        if not isinstance(kept, Tensor):
            raise SetterError(f"reducing {tap.where}: expected a tensor from reduce, got {type(kept).__name__}")
        if _version(value) != version:
            raise SetterError(f"reducing {tap.where}: the function changed the value in place; work on a copy")
        kept = kept if self.to is None else kept.to(self.to)
        return kept.clone() if kept.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() else kept


COPY = Keep()


@dataclass
class _Counted:
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
class Proxy(_Counted):
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
class Setter(_Counted):
    """A pending change of one site's value."""

    turn: ClassVar[Turn] = Turn.SET

    value: Any = None
    copies: int | None = None
    applied: int = 0
    around: Surroundings | None = None  # where the setting outlives a pass: the batch is that of the present call

    def meets(self, value: Any, steps: Steps) -> Any:
        """Put the new value in the old one's place."""
        if not self.takes():
            return value
        return put(value, self.site.items, self.changed(pick(value, self.site)), steps.given)

    def changed(self, before: Tensor) -> Tensor:
        """Return the new value for ``before``, refusing whatever would be ignored or would not fit.

        Raises:
            SetterError: the function returned None (saying whether it changed the value in place), or the new value
                has another shape, dtype or device.
        """
        if agent_of(self.site.items) is None:
            return self._new(before)
        batch = self.batch if self.around is None else self.around.batch
        members = Members.of(before, batch)
        whole = before if members is None else members.seen(members.raw)
        outer = 0 if members is None or self.around is None else members.outside(self.around.level)
        new = with_one(whole, self._new(one_of(whole, self.site, batch, outer)), self.site, batch, outer)
        return new if members is None else members.hidden(new, behind=new.ndim - whole.ndim)

    def _new(self, before: Tensor) -> Tensor:
        value = self._given(before)
        if not isinstance(value, Tensor):
            raise SetterError(f"setting {self.where}: expected a tensor, got {type(value).__name__}")
        value = self._fitted(value, before)
        self.applied += 1
        return value

    def _given(self, before: Tensor) -> Any:
        if isinstance(self.value, Proxy):
            return self._of_proxy(self.value)
        if not callable(self.value):
            return self.value
        # a copy: the function may work in place, and the module may have given its own input on
        mine = end_to_end(before.clone(), self.sequences)
        version = _version(mine)
        value = self.value(mine)
        if value is None:
            how = "changed it in place and returned None" if _version(mine) != version else "returned None"
            raise SetterError(f"setting {self.where}: the function {how}; return the new value")
        return value

    def _of_proxy(self, proxy: Proxy) -> Tensor:
        values = proxy.live or proxy.found
        if not values and not proxy.done:
            raise SetterError(f"setting {self.where}: {proxy.where} does not exist yet, it comes later")
        if not proxy.done:
            return values[-1]
        if proxy.call == "all" and self.calls <= len(values):
            return values[self.calls - 1]  # call by call
        return proxy.resolve()

    def _fitted(self, value: Tensor, before: Tensor) -> Tensor:
        members = Members.of(before, self.batch)
        whole = before.shape if members is None else members.seen(members.raw).shape
        value = in_sequences(value, self.sequences, whole)
        if members is not None and value.shape == whole:  # all members at once
            value = members.hidden(value)
        wanted = before.shape if self.copies is None else (self.copies, *before.shape)
        for name, given, needed in (
            ("shape", tuple(value.shape), tuple(wanted)),
            ("dtype", value.dtype, before.dtype),
            ("device", value.device, before.device),
        ):
            if given != needed:
                raise SetterError(f"setting {self.where}: {name} {given} was given where the module has {needed}")
        return value.clone()  # what comes after may work in place, and the value may be somebody's

    def _takes_again(self) -> bool:
        """Do again what was done: backward must find the activations of the forward pass."""
        if self.call != "all" and self.calls > 1:
            raise SetterError(
                f"setting {self.where}: its module ran {self.calls} times and runs again on the way back (activation "
                'checkpointing), where its calls cannot be told apart; set call="all"'
            )
        return self.applied > 0

    def why_ignored(self) -> str:
        """Say why the value was never used."""
        return f"its module ran {self.calls} time(s), not call {self.call}" if self.calls else "its module never ran"

    def finish(self) -> None:
        """Let go of what only the pass needed."""


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


class Stop(_Counted):
    """The end of the pass."""

    turn = Turn.STOP

    def meets(self, value: Any, steps: Steps) -> Any:  # noqa: ARG002 - as every tap
        """End the pass here, at the call that was asked for."""
        if self.takes():
            raise Stopped
        return value


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version  # inference tensors count none
